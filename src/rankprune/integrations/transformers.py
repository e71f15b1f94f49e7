"""TRP as a callback of the Hugging Face Trainer."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rankprune.distributed import is_sharded
from rankprune.errors import MissingExtraError, RankPruneError
from rankprune.integrations.accelerate import innermost, take_autocast_off
from rankprune.integrations.callback import OwnsTRP
from rankprune.trp import TRP

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise MissingExtraError("transformers", "transformers") from error

_KEY = "rankprune"


class TRPCallback(OwnsTRP, TrainerCallback):
    """Trains a Trainer's model with TRP, keeps TRP's state in the checkpoints, and logs ranks, MACs and overhead.

    ``callback = TRPCallback(rule=rp.Budget(macs=0.5), ramp=0.5, freeze=0.5, example_inputs=x).attach(trainer)``, and after
    ``trainer.train()`` ``callback.finalize()`` returns a decomposed copy of the model. ``callback.trp.metrics()`` goes along
    with every loss that the Trainer logs. TRP's state is in the optimizer's file of a checkpoint, wherever that is moved to,
    and without its tensors, which can be computed anew, in trainer_state.json, for sharded weights only there. (With
    restore_callback_states_from_checkpoint the Trainer says that it ignores it, for it is no other callback's.)

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
        self._heard = False
        self._progress = TrainerState()

    def attach(self, trainer: Trainer) -> "TRPCallback":
        """Become the first of the trainer's callbacks, before those that report; returns self.

        Raises:
            RankPruneError: if another one of the same name is among them.
        """
        if any(isinstance(other, TRPCallback) and other.name == self.name for other in trainer.callback_handler.callbacks):
            raise RankPruneError(f"the trainer has a TRPCallback named {self.name!r} already; give each a name=")
        self._heard = True
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Warn if there are reporters, which are called before this callback."""
        self._check_order(args)

    def _check_order(self, args: TrainingArguments) -> None:
        if args.report_to and not self._heard:
            self._heard = True
            warnings.warn(
                f"the Trainer reports to {', '.join(args.report_to)} before it calls the callbacks it was given, so TRP's "
                "metrics will not be there; leave callbacks= or add_callback and call TRPCallback(...).attach(trainer) instead",
                stacklevel=3,
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
        self._check_order(args)  # add_callback comes after on_init_end
        trp = self.start(model, state.max_steps, self.example_inputs)
        optimizer = innermost(optimizer)
        kept: Any = state.stateful_callbacks  # the dict that is written, whatever its type says
        known = optimizer.param_groups[0].pop(self._key, None), kept.get(self._key)
        if isinstance(known[1], _Now):
            raise RankPruneError(
                f"two callbacks are named {self.name!r}, and one checkpoint cannot hold both: give each a name="
            )
        restored = next((each for each in known if each and each.get("global_step") == state.global_step), None)
        if restored is not None:
            trp.load_state_dict(restored)
        elif state.global_step:
            warnings.warn("this checkpoint has no state of TRP in it, or that of another step: TRP starts anew", stacklevel=2)
        trp.attach(optimizer)
        self._progress = state
        kept[self._key] = _Now(self._state_in_json)
        self._saving = optimizer.register_state_dict_post_hook(self._add_state)

    @property
    def _key(self) -> str:
        return f"{_KEY}/{self.name}" if self.name else _KEY

    def _add_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        # A callback is not told which folder is resumed from, but optimizers keep whatever a saved group of theirs holds.
        # Those of sharded weights are taken apart, and put together differently.
        if self.trp is not None and not any(map(is_sharded, self.trp.model.parameters())):
            state_dict["param_groups"][0][self._key] = self._state()

    def _state(self) -> dict[str, Any]:
        return {} if self.trp is None else {"global_step": self._progress.global_step, **self.trp.state_dict()}

    def _state_in_json(self) -> dict[str, Any]:
        return self._state() | {"subgradients": {}, "starts": None}

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
        """Detach; where the Trainer has loaded its best checkpoint, in the state of that."""
        if self.trp is not None and args.load_best_model_at_end and state.best_model_checkpoint:
            self._go_back(self.trp, Path(state.best_model_checkpoint) / "trainer_state.json")
        self.stop()

    def _go_back(self, trp: TRP, file: Path) -> None:
        callbacks: Any = TrainerState.load_from_json(str(file)).stateful_callbacks if file.is_file() else {}
        best = callbacks.get(self._key)
        if best:
            trp.load_state_dict(best)

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
        take_autocast_off(small)
        return small


class _Now:
    """Stands for TRP's state in that of the Trainer, which is copied whenever it is written."""

    def __init__(self, read: Callable[[], dict[str, Any]]) -> None:
        self.read = read

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return self.read()
