"""Lightning's Trainer with TRPCallback ends with the weights of the plain loop."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn

import own_clock
import rankprune as rp
import toy
from lit import Lit, callback, loader, trainer
from rankprune.integrations.lightning import TRPCallback
from rankprune.latency.cache import LatencyCache

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


CASES = {
    "plain": ({}, {}),
    "clipping": ({"clip": True}, {"gradient_clip_val": toy.CLIP}),
    "accumulation": ({"accumulate": 2}, {"accumulate_grad_batches": 2}),
    "bf16": ({"bf16": True}, {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize(("loop", "settings"), CASES.values(), ids=CASES)
def test_same_weights_as_the_plain_loop(loop: dict, settings: dict) -> None:
    expected, trp, module = toy.plain_loop(**loop), callback(), Lit()
    trainer(trp, **settings).fit(module, loader())
    toy.same_weights(module, expected.model)
    toy.really_projected(trp.trp, 20 // loop.get("accumulate", 1))
    toy.finalizes(trp.finalize(), module)


def test_the_average_of_the_weights_is_that_of_the_plain_loop() -> None:
    expected, trp, module = toy.plain_loop(), callback(), Lit()
    trainer(trp, WeightAveraging(avg_fn=get_ema_avg_fn(toy.DECAY))).fit(module, loader())
    toy.same_weights(module, expected.average.module)
    small = trp.finalize()
    rp.project(module, trp.trp.plan)
    toy.finalizes(small, module)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("averaged", [False, True])
def test_resumed_is_uninterrupted(tmp_path: Path, averaged: bool) -> None:
    def fit(stop: int | None = None) -> tuple[TRPCallback, Lit]:
        trp, module = callback(freeze=0.7), Lit()
        callbacks = [trp, ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)]
        if averaged:
            callbacks.insert(0, WeightAveraging(avg_fn=get_ema_avg_fn(toy.DECAY)))
        path = f"{tmp_path}/step={stop}.ckpt" if stop else None
        trainer(*callbacks, enable_checkpointing=True).fit(module, loader(), ckpt_path=path, weights_only=True)
        return trp, module

    whole, module = fit()
    for stop in (10,) if averaged else (10, 20):  # the latter is a job started once more after its end
        trp, resumed = fit(stop)
        toy.same_weights(resumed, module)
        assert (trp.trp.steps, trp.trp.history, trp.trp.plan) == (20, whole.trp.history, whole.trp.plan)
    toy.same_weights(trp.finalize(), whole.finalize())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("bf16", [False, True])
def test_resumed_with_clipping_and_accumulation(tmp_path: Path, bf16: bool) -> None:
    expected = toy.plain_loop(clip=True, accumulate=2, bf16=bf16)
    settings = {"gradient_clip_val": toy.CLIP, "accumulate_grad_batches": 2, "precision": "bf16-mixed" if bf16 else "32-true"}
    for path in (None, f"{tmp_path}/step=5.ckpt"):
        trp, module = callback(), Lit()
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
        runner = trainer(trp, saving, enable_checkpointing=True, **settings)
        runner.fit(module, loader(), ckpt_path=path, weights_only=True)
        toy.same_weights(module, expected.model)
        toy.really_projected(trp.trp, 10)


class Late(SingleDeviceStrategy):
    """Loads its checkpoints late, as those for sharded weights do."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, Late])
def test_resumed_without_timing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: type[SingleDeviceStrategy]
) -> None:
    def fit(epochs: int, cache: str, checkpoint: Path | None = None) -> tuple[TRPCallback, pl.Trainer, Lit]:
        monkeypatch.setenv("RANKPRUNE_CACHE", str(tmp_path / cache))
        LatencyCache._remembered.clear()
        trp, module = callback(rule=rp.Budget(latency=0.6, backend="timeless"), ramp=toy.EVERY), Lit()
        runner = trainer(trp, max_epochs=epochs, strategy=strategy("cpu"))
        runner.fit(module, loader(), ckpt_path=checkpoint)
        return trp, runner, module

    own_clock.add(monkeypatch, own_clock.Timeless())
    timings = own_clock.count_timings(monkeypatch)
    whole, _, module = fit(toy.EPOCHS, "first")
    fit(1, "second")[1].save_checkpoint(tmp_path / "it.ckpt")
    assert timings != []
    timings.clear()
    trp, _, resumed = fit(toy.EPOCHS, "third", tmp_path / "it.ckpt")
    assert timings == []
    assert (trp.trp.steps, trp.trp.history, trp.trp.plan) == (20, whole.trp.history, whole.trp.plan)
    toy.same_weights(resumed, module)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"optimizer": 1}, "optimizer=1: there are 1"), ({"submodule": "body"}, "submodule='body': Lit has no part of that name")],
)
def test_what_is_not_there_is_named(wrong: dict, said: str) -> None:
    with pytest.raises(rp.RankPruneError, match=said):
        trainer(callback(**wrong)).fit(Lit(), loader())


class TwoOptimizers(Lit):
    """Steps them by hand, in training_step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [toy.sgd(self.features), toy.sgd(self.head)]


def test_metrics_are_logged_where_optimizers_step_at_different_rates(tmp_path: Path) -> None:
    class Two(TwoOptimizers):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.manual_backward(self(**batch)["loss"])
            self.log("own", 1.0)
            for optimizer in self.optimizers()[: 1 + batch_idx % 2]:
                optimizer.step()
                optimizer.zero_grad()

    trp = callback(submodule="features", ramp=0, include=["*"])
    trainer(trp, logger=CSVLogger(tmp_path), log_every_n_steps=5).fit(Two(), loader())
    (file,) = tmp_path.rglob("metrics.csv")
    rows = [row for row in csv.DictReader(file.read_text().splitlines()) if row["own"]]
    assert len(rows) == toy.BATCHES * toy.EPOCHS // 5
    assert [row["features/rankprune/rank/2"] for row in rows] == [str(float(trp.trp.history[i][1]["2"])) for i in (0, 1, 2, 4)]


def test_ranks_costs_and_overhead_reach_the_loggers(tmp_path: Path) -> None:
    trp = callback()
    loggers = [TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "csv")]
    trainer(trp, logger=loggers).fit(Lit(), loader())
    toy.good_metrics(toy.scalars(tmp_path), trp.trp.history)

    (file,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    table = {tag: [float(row[tag]) for row in rows] for tag in rows[0]}
    toy.good_metrics(table, trp.trp.history)
    assert table["step"] == [3, 7, 11, 15, 19]  # Lightning counts from 0


def test_another_fit_of_the_module_goes_on() -> None:
    trp, module = callback(ramp=8), Lit()
    for _ in range(2):
        trainer(trp, max_epochs=1).fit(module, loader())
    toy.really_projected(trp.trp, 20)


def test_another_module_starts_anew() -> None:
    trp = callback()
    trainer(trp).fit(Lit(), loader())
    first = trp.trp
    module = Lit()
    trainer(trp).fit(module, loader())
    assert trp.trp is not first
    assert trp.trp.model is module
    toy.really_projected(trp.trp, 20)


class Rehearsing(pl.Callback):
    """Saves and restores everything around some steps of its own, as Lightning's tuners do."""

    def __init__(self, folder: Path, hook: str) -> None:
        self.path = folder / "before.ckpt"
        setattr(self, hook, self.rehearse)

    def rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)
        optimizer = trainer.optimizers[0]
        for _ in range(toy.EVERY + 1):
            pl_module(**toy.Data()[[0, 1]])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        connector = trainer._checkpoint_connector
        connector.resume_start(self.path, weights_only=True)
        connector.restore_model()
        connector.restore_callbacks()
        connector.restore_optimizers_and_schedulers()
        connector.resume_end()


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_epoch_start"])
def test_a_tuner_leaves_the_training_as_it_was(tmp_path: Path, hook: str) -> None:
    expected, trp = toy.plain_loop(), callback()
    for _ in range(2):  # the second fit is of another module, as in a sweep
        module = Lit()
        trainer(Rehearsing(tmp_path, hook), trp).fit(module, loader())
        toy.same_weights(module, expected.model)
        toy.really_projected(trp.trp, 20)


def test_a_checkpoint_without_a_state_is_told_of(tmp_path: Path) -> None:
    runner = trainer(max_epochs=1)
    runner.fit(Lit(), loader())
    runner.save_checkpoint(tmp_path / "dense.ckpt")
    trp = callback(ramp=0)
    with pytest.warns(UserWarning, match="TRP starts anew at step 10"):
        trainer(trp).fit(Lit(), loader(), ckpt_path=tmp_path / "dense.ckpt", weights_only=True)
    assert [step for step, _ in trp.trp.history] == [4, 8]


@pytest.mark.parametrize("fails", [False, True])
def test_detached_afterwards(fails: bool) -> None:
    class Failing(Lit):
        def on_train_epoch_end(self) -> None:
            if fails:
                raise KeyError("some failure")

    trp = callback()
    runner = trainer(trp)
    if fails:
        with pytest.raises(KeyError, match="some failure"):
            runner.fit(Failing(), loader())
    else:
        runner.fit(Failing(), loader())
    steps = trp.trp.steps
    assert steps == (10 if fails else 20)
    optimizer = runner.optimizers[0]
    optimizer.step()
    assert trp.trp.steps == steps
    rp.TRP(trp.trp.model, rule=rp.Energy(0.9)).attach(optimizer)


def test_the_example_is_the_modules_own_unless_given() -> None:
    module = Lit()
    module.example_input_array = {"x": toy.X}
    trp = callback(example_inputs=None, rule=rp.Budget(macs=0.5))
    trainer(trp).fit(module, loader())
    assert trp.trp.plan.macs <= 0.5 * trp.trp.plan.macs_dense


class BothStep(TwoOptimizers):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.manual_backward(self(**batch)["loss"])
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def of_the_head(**more: Any) -> TRPCallback:
    return callback(submodule="head", optimizer=1, example_inputs=torch.zeros(1, 576), **more)


def test_one_part_of_the_module_and_the_second_of_its_optimizers() -> None:
    trp, module = of_the_head(ramp=10), BothStep()
    trainer(trp).fit(module, loader())
    assert trp.trp.model is module.head
    assert [step for step, _ in trp.trp.history] == [4, 8, 12, 16, 20]
    assert trp.trp.plan.ranks.keys() == {"0"}


def test_two_parts_have_a_callback_each(tmp_path: Path) -> None:
    def fit(epochs: int, **more: Any) -> tuple[TRPCallback, TRPCallback, pl.Trainer, pl.LightningModule]:
        features, head = callback(submodule="features", include=["*"], ramp=8, freeze=8), of_the_head(ramp=8, freeze=8)
        runner, module = trainer(features, head, max_epochs=epochs, logger=CSVLogger(tmp_path)), BothStep()
        runner.fit(module, loader(), **more)
        return features, head, runner, module

    *whole, _, module = fit(toy.EPOCHS)
    fit(1)[2].save_checkpoint(tmp_path / "half.ckpt")
    *resumed, runner, other = fit(toy.EPOCHS, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    toy.same_weights(other, module)
    for trp, uninterrupted in zip(resumed, whole, strict=True):
        assert trp.trp.history == uninterrupted.trp.history
        assert trp.trp.history[-1][0] == 20
    assert {"features/rankprune/macs", "head/rankprune/macs"} <= runner.logged_metrics.keys()


def test_two_names_on_one_optimizer(tmp_path: Path) -> None:
    def fit(epochs: int, **more: Any) -> tuple[TRPCallback, TRPCallback, pl.Trainer, pl.LightningModule]:
        a, b = (callback(name=name, include=[f"{name}.*"], ramp=8) for name in ("features", "head"))
        runner, module = trainer(a, b, max_epochs=epochs, logger=CSVLogger(tmp_path)), Lit()
        runner.fit(module, loader(), **more)
        return a, b, runner, module

    *whole, _, module = fit(toy.EPOCHS)
    fit(1)[2].save_checkpoint(tmp_path / "half.ckpt")
    *resumed, runner, other = fit(toy.EPOCHS, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    toy.same_weights(other, module)
    assert [{layer.split(".")[0] for layer in trp.trp.plan.ranks} for trp in whole] == [{"features"}, {"head"}]
    assert [trp.trp.steps for trp in resumed] == [20, 20]
    assert {"features/rankprune/macs", "head/rankprune/macs"} <= runner.logged_metrics.keys()


def test_shares_of_a_training_whose_steps_are_taken_by_hand_are_refused() -> None:
    with pytest.raises(rp.RankPruneError, match="manual optimization"):
        trainer(of_the_head(ramp=0.5)).fit(BothStep(), loader())


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, Late])
def test_a_fit_that_has_ended_keeps_its_state(tmp_path: Path, strategy: type[SingleDeviceStrategy]) -> None:
    def fit(checkpoint: Path | None = None) -> tuple[TRPCallback, pl.Trainer, Lit]:
        trp, module = callback(), Lit()
        runner = trainer(trp, strategy=strategy("cpu"))
        runner.fit(module, loader(), ckpt_path=checkpoint)
        return trp, runner, module

    ended, runner, _ = fit()
    runner.save_checkpoint(tmp_path / "it.ckpt")
    again, *_ = fit(tmp_path / "it.ckpt")
    assert (again.trp.steps, again.trp.history, again.trp.plan) == (20, ended.trp.history, ended.trp.plan)
    toy.same_weights(again.finalize(), ended.finalize())


def test_a_share_of_an_endless_training() -> None:
    with pytest.raises(rp.RankPruneError, match="length of this training is not known"):
        trainer(callback(), max_epochs=-1).fit(Lit(), loader())
