"""TRP as a callback of Lightning's Trainer."""

import math
import warnings
from typing import Any

from rankprune.errors import MissingExtraError, RankPruneError
from rankprune.integrations.callback import OwnsTRP
from rankprune.trp import TRP
from rankprune.wrappers import named_modules, refuse_flat, unwrap

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
except ImportError as error:
    raise MissingExtraError("lightning", "lightning") from error


class TRPCallback(OwnsTRP, Callback):
    """Trains a LightningModule with TRP, keeps TRP's state in Lightning's checkpoints, and logs ranks, MACs and overhead.

    Put ``callback = TRPCallback(rule=rp.Budget(macs=0.5), ramp=0.5, freeze=0.5, example_inputs=x)`` among the Trainer's
    `callbacks`; after the fit ``callback.finalize()`` returns a decomposed copy of the module. ``callback.trp.metrics()`` goes
    to every logger at each of Lightning's `log_every_n_steps`. Another fit of the same module goes on where the last one
    stopped. A checkpoint that the trainer tests, validates or predicts with is what `finalize` takes next: the module has its
    weights then. Several parts of a module take a callback each, told apart by submodule, optimizer or `name`; ``finalize``
    returns that part alone.

    Args:
        submodule: the name of the part to train with TRP, which example_inputs are then for, and which metrics are named
            after; "" is the whole module.
        optimizer: the index of the one that holds the weights, where there are several.
        settings: those of TRP; a float as ramp or freeze is a share of the whole training, and example_inputs are by default
            the module's `example_input_array`. List StochasticWeightAveraging after this callback: where there is BatchNorm
            it adds an epoch without steps, which would count.

    Attributes:
        trp: the TRP of the present or the last fit; None before the first.

    Raises:
        RankPruneError: for shares out of range; when a fit starts, whatever TRP and TRP.attach raise, and if the strategy is
            FSDP of the first kind (FSDPStrategy).
    """

    def __init__(self, *, submodule: str = "", optimizer: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self.submodule, self.optimizer = submodule, optimizer
        self._restored: dict[str, Any] | None = None
        self._resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a state that no fit has used, as after testing a checkpoint, and before a fit the TRP of another module."""
        self._restored = None
        if stage == "fit" and self.trp is not None and all(part is not self.trp.model for part in pl_module.modules()):
            self.trp = None  # tuners save and restore all states before on_fit_start

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the TRP, or take that of an earlier fit of this module, in the state of the checkpoint, and attach it."""
        part = named_modules(pl_module).get(self.submodule)
        if part is None:
            raise RankPruneError(f"submodule={self.submodule!r}: {type(pl_module).__name__} has no part of that name")
        if trainer.strategy.model is not None:
            refuse_flat(trainer.strategy.model)
        trp = self.trp
        if trp is None or trp.model is not unwrap(part):
            if self.needs_length and not pl_module.automatic_optimization:
                raise RankPruneError(
                    f"ramp={self.ramp}, freeze={self.freeze}: under manual optimization it is not known how many steps the "
                    "optimizer will take; give whole numbers of steps"
                )
            inputs = self.example_inputs
            if inputs is None and not self.submodule:
                inputs = pl_module.example_input_array
            total_steps = _length(trainer) if self.needs_length else 0
            trp = self.start(part, total_steps, trainer.precision_plugin.convert_input(inputs))
        self.stop()  # an earlier fit may have ended with no word
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._go_on(trp, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach under those strategies that load their checkpoints only after on_fit_start."""
        if self.trp is None:
            return
        if trainer.strategy.restore_checkpoint_after_setup:
            self._go_on(self.trp, trainer)
        if trainer.global_step and not self.trp.steps and not self._resumed:
            warnings.warn(f"TRP starts anew at step {trainer.global_step}: there is no state of it to go on from", stacklevel=2)

    def _go_on(self, trp: TRP, trainer: Trainer) -> None:
        self._resumed = self._restored is not None
        if self._restored is not None:
            trp.load_state_dict(self._restored)  # before attach, which would time the network
            self._restored = None
        optimizers = trainer.optimizers
        if not 0 <= self.optimizer < len(optimizers):
            raise RankPruneError(f"optimizer={self.optimizer}: there are {len(optimizers)}, counted from 0")
        trp.attach(optimizers[self.optimizer])

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the state that belongs to the weights which were loaded to be tested."""
        self._follow(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As on_test_start; nothing within a fit."""
        self._follow(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As on_test_start."""
        self._follow(trainer, pl_module)

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trp = self.trp
        if trp is None or trp.attached or not trainer.ckpt_path or all(part is not trp.model for part in pl_module.modules()):
            return
        if self._restored:
            trp.load_state_dict(self._restored)
            self._restored = None
        else:
            warnings.warn(
                f"{trainer.ckpt_path} has weights and no state of TRP: finalize() goes by that of the last fit", stacklevel=2
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, where Lightning does."""
        if self.trp is not None and trainer._logger_connector.should_update_logs:  # log_dict takes 1 ms for each of the metrics
            pl_module.log_dict(self.metrics(self.submodule))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach; after a fit that had nothing left to do, in the state that it was to go on from."""
        if self.trp is not None and self._restored is not None:
            self.trp.load_state_dict(self._restored)
            self._restored = None
        self.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach."""
        self.stop()

    @property
    def state_key(self) -> str:
        """Where its state is in checkpoints: another place for each submodule, optimizer and name."""
        return self._generate_state_key(submodule=self.submodule, optimizer=self.optimizer, name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """What Lightning's checkpoints keep."""
        return {} if self.trp is None else self.trp.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state from a checkpoint, for the fit that is about to start or for this one, which a tuner rolls back."""
        if self.trp is not None and self.trp.attached:
            self.trp.load_state_dict(state_dict)
        else:
            self._restored = state_dict


def _length(trainer: Trainer) -> float:
    """How many steps the optimizer will take, from the first fit on."""
    fresh = trainer.train_dataloader is None
    total = trainer.estimated_stepping_batches
    callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    schedules = [c for c in callbacks if isinstance(c, GradientAccumulationScheduler)]  # which Lightning leaves out
    if schedules and trainer.max_epochs and trainer.max_epochs > 0 and math.isfinite(trainer.num_training_batches):
        each = (schedules[-1].get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs))
        total = sum(math.ceil(trainer.num_training_batches / batches) for batches in each)
        total = total if trainer.max_steps == -1 else min(total, trainer.max_steps)
    if fresh:
        trainer.fit_loop._combined_loader = None  # made anew where the fit begins, it goes on where the checkpoint left it
    return total
