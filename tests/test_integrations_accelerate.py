"""A loop of Accelerate's with TRP attached ends with the weights of the plain loop."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import own_clock
import rankprune as rp
import toy
from rankprune.integrations.accelerate import attach, finalize
from rankprune.latency.cache import LatencyCache


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its precision and its accumulation in singletons, which the Trainer of transformers shares."""

    def forget() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    forget()
    yield
    forget()


class Run:
    """A training that can be saved and loaded."""

    def __init__(self, folder: Path, *, clip: bool = False, ramp: int = 10, **settings: Any) -> None:
        self.accelerator = Accelerator(cpu=True, project_dir=folder, **settings)
        self.accelerator.init_trackers("run")
        loader = DataLoader(toy.Data(), batch_size=toy.BATCH)
        net, self.clip = toy.Net(), clip
        self.model, self.optimizer, self.loader = self.accelerator.prepare(net, toy.sgd(net), loader)
        self.trp = attach(rp.TRP(self.model, ramp=ramp, **toy.settings()), self.accelerator, self.optimizer)
        self.average = toy.moving_average(net)

    def epoch(self) -> None:
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**batch)["loss"])
                if self.clip and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), toy.CLIP)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.average.update_parameters(self.model)
                if self.trp.steps % toy.EVERY == 0:
                    self.accelerator.log(self.trp.metrics(), step=self.trp.steps)

    def whole(self) -> "Run":
        for _ in range(toy.EPOCHS):
            self.epoch()
        self.accelerator.end_training()
        return self


CASES = {
    "plain": ({}, {}),
    "clipping": ({"clip": True}, {"clip": True}),
    "accumulation": ({"accumulate": 2}, {"gradient_accumulation_steps": 2, "ramp": 5}),
    "bf16": ({"bf16": True}, {"mixed_precision": "bf16"}),
}


@pytest.mark.parametrize(("loop", "settings"), CASES.values(), ids=CASES)
def test_same_weights_as_the_plain_loop(loop: dict, settings: dict, tmp_path: Path) -> None:
    expected, run = toy.plain_loop(**loop), Run(tmp_path, **settings).whole()
    toy.same_weights(run.model, expected.model)
    toy.same_weights(run.average, expected.average)
    toy.really_projected(run.trp, 20 // loop.get("accumulate", 1))
    toy.finalizes(finalize(run.trp), run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False))


@pytest.mark.filterwarnings("ignore:this TRP has seen no step")
def test_decorators_of_the_users_stay_and_autocast_of_accelerate_does_not(tmp_path: Path) -> None:
    class Narrow(toy.Net):
        @torch.autocast("cpu", torch.bfloat16)
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            return super().forward(x, labels)

    for put in (False, True):  # on the class, and on the instance
        accelerator, net = Accelerator(cpu=True, mixed_precision="bf16"), Narrow()
        if put:
            net.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(toy.Net.forward), net)
        model, optimizer = accelerator.prepare(net, toy.sgd(net))
        trp = attach(rp.TRP(model, **toy.settings()), accelerator, optimizer)
        small = finalize(trp)
        assert small(toy.X).dtype == torch.bfloat16
        assert ("forward" in vars(small)) == put


@pytest.mark.filterwarnings("ignore:this TRP has seen no step")
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_what_was_finalized_can_be_prepared_again(precision: str) -> None:
    accelerator, net = Accelerator(cpu=True, mixed_precision=precision), toy.Net()
    model, optimizer = accelerator.prepare(net, toy.sgd(net))
    small = finalize(attach(rp.TRP(model, **toy.settings()), accelerator, optimizer))
    seen = []
    small.head[2].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    accelerator.prepare(small)(toy.X)
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32]


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole = Run(tmp_path).whole()

    part = Run(tmp_path)
    part.epoch()
    part.accelerator.save_state(tmp_path / "state")

    resumed = Run(tmp_path)
    resumed.accelerator.load_state(tmp_path / "state")
    assert (resumed.trp.steps, resumed.trp.history) == (10, part.trp.history)
    resumed.epoch()
    toy.same_weights(resumed.model, whole.model)
    assert (resumed.trp.steps, resumed.trp.history, resumed.trp.plan) == (20, whole.trp.history, whole.trp.plan)
    toy.same_weights(resumed.trp.finalize(), whole.trp.finalize())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_resumed_with_clipping_and_accumulation(tmp_path: Path, precision: str) -> None:
    expected = toy.plain_loop(clip=True, accumulate=2, bf16=precision == "bf16")
    settings = {"clip": True, "ramp": 5, "gradient_accumulation_steps": 2, "mixed_precision": precision}
    part = Run(tmp_path, **settings)
    part.epoch()
    part.accelerator.save_state(tmp_path / "state")

    resumed = Run(tmp_path, **settings)
    resumed.accelerator.load_state(tmp_path / "state")
    resumed.epoch()
    toy.same_weights(resumed.model, expected.model)
    toy.really_projected(resumed.trp, 10)


def test_closures() -> None:
    accelerator, net = Accelerator(cpu=True), toy.Net()
    model, optimizer, batches = accelerator.prepare(net, toy.sgd(net), DataLoader(toy.Data(), batch_size=toy.BATCH))
    trp = attach(rp.TRP(model, ramp=10, **toy.settings()), accelerator, optimizer)
    for _ in range(toy.EPOCHS):
        for batch in batches:

            def closure(batch: dict = batch) -> Tensor:
                optimizer.zero_grad()
                loss = model(**batch)["loss"]
                accelerator.backward(loss)
                return loss

            optimizer.step(closure)
    toy.same_weights(model, toy.plain_loop().model)
    toy.really_projected(trp, 20)


def test_resumed_without_timing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> tuple[Accelerator, Optimizer, rp.TRP]:
        LatencyCache._remembered.clear()
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        accelerator, net = Accelerator(cpu=True, project_dir=tmp_path), toy.Net()
        model, optimizer = accelerator.prepare(net, toy.sgd(net))
        rule = rp.Budget(latency=0.6, backend="timeless")
        return accelerator, optimizer, rp.TRP(model, **toy.settings(rule=rule))

    monkeypatch.setenv("RANKPRUNE_CACHE", str(tmp_path / "cache"))
    own_clock.add(monkeypatch, own_clock.Timeless())
    timings = own_clock.count_timings(monkeypatch)
    accelerator, optimizer, trp = made()
    attach(trp, accelerator, optimizer)
    assert timings != []
    accelerator.save_state(tmp_path / "state")
    timings.clear()

    for _ in range(2):  # what a resumed training saves can be resumed in its turn
        accelerator, optimizer, resumed = made()
        accelerator.register_for_checkpointing(resumed)
        accelerator.load_state(tmp_path / "state")
        attach(resumed, accelerator, optimizer)
        assert timings == []
        assert resumed.state_dict()["latency"] == trp.state_dict()["latency"]
        accelerator.save_state(tmp_path / "state")


def test_ranks_costs_and_overhead_reach_the_trackers(tmp_path: Path) -> None:
    run = Run(tmp_path, log_with="tensorboard").whole()
    toy.good_metrics(toy.scalars(tmp_path), run.trp.history)


def test_an_optimizer_that_was_not_prepared() -> None:
    accelerator, model = Accelerator(cpu=True), toy.Net()
    optimizer = toy.sgd(model)
    trp = attach(rp.TRP(model, **toy.settings()), accelerator, optimizer)
    model(toy.X).sum().backward()
    optimizer.step()
    assert trp.steps == 1


def test_a_refused_one_is_not_saved(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(rp.RankPruneError, match="another TRP is attached"):
        attach(rp.TRP(run.model, **toy.settings()), run.accelerator, run.optimizer)
    run.accelerator.save_state(tmp_path / "state")
    assert [file.name for file in (tmp_path / "state").glob("custom*")] == ["custom_checkpoint_0.pkl"]
