"""TRP beside what else Lightning's Trainer does: tests of checkpoints, loaders that resume, accumulation that changes."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import rankprune as rp
import toy
from lit import Lit, callback, loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def test_testing_a_checkpoint_does_not_disturb_the_next_fit(tmp_path: Path) -> None:
    trp, module = callback(), Lit()
    runner = trainer(trp)
    runner.fit(module, loader())
    runner.save_checkpoint(tmp_path / "it.ckpt")
    runner.test(module, loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False, weights_only=True)
    trainer(trp).fit(Lit(), loader())
    toy.really_projected(trp.trp, 20)


class Judged(Lit):
    validation_step = Lit.test_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch)["logits"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty", "ignore:.* no `val_dataloader`")
@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_what_is_tested_is_what_is_finalized(tmp_path: Path, stage: str) -> None:
    trp, module = callback(rule=rp.Budget(params=0.5), ramp=toy.EVERY), Judged()
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    runner = trainer(trp, saving, enable_checkpointing=True)
    runner.fit(module, loader())
    settings = {"ckpt_path": f"{tmp_path}/step=10.ckpt", "weights_only": True}
    getattr(runner, stage)(module, loader(), **settings)
    assert (trp.trp.steps, trp.trp.history[-1][0]) == (10, 8)
    expected = callback(rule=rp.Budget(params=0.5), ramp=toy.EVERY)
    trainer(expected, max_steps=10).fit(Judged(), loader())
    toy.same_weights(trp.finalize(), expected.finalize())
    runner.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.warns(UserWarning, match="has weights and no state of TRP"):
        getattr(runner, stage)(module, loader(), ckpt_path=tmp_path / "weights.ckpt", weights_only=True)


class Stateful(DataLoader):
    """Goes on in the middle of an epoch."""

    def __init__(self) -> None:
        super().__init__(toy.Data(), batch_size=toy.BATCH)
        self.seen = self.skipped = 0

    def __iter__(self):
        skipped, self.skipped = self.skipped, 0
        for i, batch in enumerate(super().__iter__()):
            if i >= skipped:
                self.seen = i + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["seen"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("ramp", [0.5, 10])
def test_a_loader_goes_on_within_an_epoch(tmp_path: Path, ramp: float) -> None:
    def fit(path: str | None = None) -> Lit:
        module = Lit()
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
        runner = trainer(callback(ramp=ramp), saving, enable_checkpointing=True)
        runner.fit(module, Stateful(), ckpt_path=path, weights_only=True)
        return module

    toy.same_weights(fit(), fit(f"{tmp_path}/step=7.ckpt"))


@pytest.mark.parametrize(("limits", "steps"), [({}, 13), ({"max_steps": 9}, 9)])
def test_shares_of_a_training_that_accumulates_more_and_more(limits: dict[str, int], steps: int) -> None:
    trp, scheduler = callback(ramp=1.0, freeze=1.0), GradientAccumulationScheduler({0: 1, 1: 4})
    runner = trainer(trp, scheduler, **limits)
    runner.fit(Lit(), loader())
    assert runner.global_step == steps
    assert (trp.trp.schedule.ramp, trp.trp.schedule.freeze) == (steps, steps)


def test_flat_shards_of_a_strategy_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = trainer(callback())
    setup = runner.strategy.setup
    kind = type("FullyShardedDataParallel", (nn.Sequential,), {})
    monkeypatch.setattr(
        runner.strategy, "setup", lambda t: (setup(t), setattr(runner.strategy, "model", kind(runner.strategy.model)))
    )
    with pytest.raises(rp.RankPruneError, match="ModelParallelStrategy in Lightning"):
        runner.fit(Lit(), loader())
