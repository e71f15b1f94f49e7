"""TRP as a callback of the Hugging Face Trainer."""

import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rankprune.errors import MissingExtraError, RankPruneError
from rankprune.integrations.callback import OwnsTRP

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise MissingExtraError("transformers", "transformers") from error

_KEY = "rankprune"


class TRPCallback(OwnsTRP, TrainerCallback):
    """Trains a Trainer's model with TRP, keeps TRP's state in the checkpoints, and logs ranks, MACs and overhead.

    ``callback = TRPCallback(rule=rp.Budget(macs=0.5), ramp=0.5, example_inputs=x).attach(trainer)``, and after
    ``trainer.train()`` ``callback.finalize()`` returns a decomposed copy of the model. ``callback.trp.metrics()`` goes along
    with every loss that the Trainer logs. TRP's state is in the optimizer's file of a checkpoint, wherever that is moved to.

    Among the Trainer's `callbacks` it trains alike, but the Trainer reports to TensorBoard and the like before it calls those,
    so that they do not see TRP's metrics; a warning says so.

    Args:
        settings: those of TRP; a float as ramp or freeze is a share of the whole training, and example_inputs may be on any
            device. Several callbacks on one trainer, with other layers each, take a `name`.

    Attributes:
        trp: the TRP of the present or the last training; None before the first.

    Raises:
        RankPruneError: for shares out of range; when the training starts, whatever TRP and TRP.attach raise.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._saving: Any = None

    def attach(self, trainer: Trainer) -> "TRPCallback":
        """Become the first of the trainer's callbacks, before those that report; returns self.

        Raises:
            RankPruneError: if another one of the same name is among them.
        """
        if any(isinstance(other, TRPCallback) and other.name == self.name for other in trainer.callback_handler.callbacks):
            raise RankPruneError(f"the trainer has a TRPCallback named {self.name!r} already; give each a name=")
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Warn if there are reporters, which are called before this callback."""
        if args.report_to:
            warnings.warn(
                f"the Trainer reports to {', '.join(args.report_to)} before it calls the callbacks it was given, so TRP's "
                "metrics will not be there; leave callbacks= and call TRPCallback(...).attach(trainer) instead",
                stacklevel=2,
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Make the TRP, in the state of the checkpoint if there is one, and attach it."""
        trp = self.start(model, state.max_steps, self.example_inputs)
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):  # Accelerate's has no hooks of its own
            optimizer = inner
        restored = optimizer.param_groups[0].pop(self._key, None)
        if restored is not None:
            trp.load_state_dict(restored)
        elif state.global_step:
            warnings.warn("this checkpoint has no state of TRP in it: TRP starts anew", stacklevel=2)
        trp.attach(optimizer)
        self._saving = optimizer.register_state_dict_post_hook(self._add_state)

    @property
    def _key(self) -> str:
        return f"{_KEY}/{self.name}" if self.name else _KEY

    def _add_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        # A callback is not told which folder is resumed from, but optimizers keep whatever a saved group of theirs holds.
        group = state_dict["param_groups"][0]
        if self._key in group:
            raise RankPruneError(
                f"two callbacks are named {self.name!r}, and one checkpoint cannot hold both: give each a name="
            )
        if self.trp is not None:
            group[self._key] = self.trp.state_dict()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add the metrics to what is logged, if it is of the training."""
        if self.trp is not None and logs is not None and "loss" in logs:
            metrics = self.metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Detach, and warn if the weights are now those of a checkpoint from within the ramp."""
        best, trp = getattr(state, "best_global_step", None), self.trp
        if args.load_best_model_at_end and trp is not None and best and best < trp.schedule.ramp:
            warnings.warn(
                f"the best checkpoint, which was loaded, is of step {best}, before the ramp ended at {trp.schedule.ramp}: "
                "finalize() will truncate more than this network was trained for; choose among checkpoints from after the ramp",
                stacklevel=2,
            )
        self.stop()

    def stop(self) -> None:
        """Detach, and save no more states."""
        super().stop()
        if self._saving is not None:
            self._saving.remove()

    def finalize(self, into: nn.Module | None = None) -> nn.Module:
        """After the training, TRP.finalize: a decomposed copy of the model, which runs in the precision of its weights.

        Raises:
            RankPruneError: if no training has started yet, and whatever TRP.finalize raises.
        """
        small = super().finalize(into)
        if small.__dict__.pop("_original_forward", None) is not None:  # the trainer's mixed precision is around forward
            del small.forward
        return small
