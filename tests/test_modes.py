"""Modules whose train() does more than set a flag come back from a measurement as they were, and into copies."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import own_clock
import rankprune as rp
from rankprune.passes import undisturbed


def test_generators_of_its_gpus_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[int]] = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: kept.append(devices) or contextlib.nullcontext())
    with FakeTensorMode():
        model = nn.Linear(2, 2)
        model.weight = nn.Parameter(torch.empty(2, 2, device="cuda:1"))
        with undisturbed(model):
            pass
    assert kept == [[1]]


class Merging(nn.Module):
    """Merges an update into its weight in eval mode, as layers of LoRA do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))
        self.update = nn.Parameter(torch.full((8, 8), 0.5))
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.merged:
            self.weight.data += -self.update if mode else self.update
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight if self.merged else self.weight + self.update)


class Frozen(nn.Sequential):
    """Keeps a part of itself in eval mode, and returns nothing from train(), as many do."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self[1].eval()


class Anew(nn.Sequential):
    """Copies itself by building itself anew, in training mode, as torchvision's feature extractors do."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Anew":
        return Anew(*(copy.deepcopy(module, memo) for module in self)).train()


def frozen() -> Frozen:
    return Frozen(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 4))


@pytest.mark.parametrize("modes", [(True, True), (False, False), (True, False)])
def test_what_merges_weights_is_left_as_it_was(modes: tuple[bool, bool]) -> None:
    first, last = Merging(), Merging()
    model = nn.Sequential(first, nn.Linear(8, 8), nn.Sequential(last))
    model.train(modes[0])
    model[2].train(modes[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert [first.merged, last.merged] == [not mode for mode in modes]
    rp.count(model, torch.randn(2, 8))
    assert [first.merged, last.merged] == [not mode for mode in modes]
    assert [module.training for module in model] == [modes[0], modes[0], modes[1]]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_what_keeps_parts_in_eval_mode_is_left_as_it_was() -> None:
    model = frozen()
    model.train()
    model[0].eval()  # by its owner, for now
    with undisturbed(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in (model, *model)] == [True, False, False, True, True]


def test_a_train_that_returns_nothing_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_clock.use(monkeypatch)
    own_clock.add(monkeypatch, own_clock.TimedEager())
    model, x = frozen(), torch.randn(4, 16)
    plan = rp.make_plan(model, x, rule=rp.Budget(latency=0.8, backend="eager"), include=["0", "2"])
    assert plan.decomposed
    small = rp.decompose(model, plan)
    assert small.training
    rp.save(tmp_path / "out", small, plan)
    assert isinstance(rp.load(tmp_path / "out", frozen()), Frozen)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("within", [True, False])
def test_a_copy_that_is_built_anew_has_the_modes_of_the_original(training: bool, within: bool) -> None:
    model: nn.Sequential = Anew(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    model = nn.Sequential(model, nn.Linear(4, 4)) if within else model
    model.train(training)
    small = rp.decompose(model, rp.make_plan(model, rule=rp.FixedRank(2)))
    assert {module.training for module in small.modules()} == {training}


def test_a_feature_extractor_of_torchvision_trains_on_after_planning() -> None:
    models = pytest.importorskip("torchvision.models")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = extraction.create_feature_extractor(models.alexnet(num_classes=4), ["classifier.5"]).train()
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(model(x)["classifier.5"], model(x)["classifier.5"]), "it drops out"
    plan = rp.make_plan(model, x, rule=rp.FixedRank(2))
    assert not torch.equal(model(x)["classifier.5"], model(x)["classifier.5"])
    assert model.graph is model.train_graph
    small = rp.decompose(model.eval(), plan)
    assert small.graph is small.eval_graph
    assert torch.equal(small(x)["classifier.5"], small(x)["classifier.5"])
