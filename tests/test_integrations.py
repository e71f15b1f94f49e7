"""What the integrations share: the missing package, and settings that cannot be."""

import importlib
import pickle
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import rankprune as rp
import toy
from rankprune.inputs import on_device
from rankprune.integrations.callback import OwnsTRP


@pytest.mark.parametrize("name", ["lightning", "transformers", "accelerate"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == name or m == f"rankprune.integrations.{name}"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(rp.MissingExtraError, match=rf"{name}.*pip install 'rankprune\[{name}\]'"):
        importlib.import_module(f"rankprune.integrations.{name}")


@pytest.mark.parametrize("settings", [{"ramp": 1.5}, {"ramp": -0.1}, {"freeze": 2.0}, {"ramp": float("nan")}])
def test_no_share_of_the_training(settings: dict[str, Any]) -> None:
    with pytest.raises(rp.RankPruneError, match="give a share of the training"):
        OwnsTRP(rule=rp.Energy(0.9), **settings)


@pytest.mark.parametrize("length", [float("inf"), -1, 0])
def test_a_share_of_an_unknown_length(length: float) -> None:
    with pytest.raises(rp.RankPruneError, match="whole numbers of steps"):
        OwnsTRP(rule=rp.Energy(0.9), freeze=0.5).start(nn.Linear(4, 4), length, None)


def test_a_ramp_for_a_rule_that_cannot_be_annealed_is_refused_before_the_training() -> None:
    with pytest.raises(rp.RankPruneError, match="cannot be annealed"):
        OwnsTRP(rule=rp.FixedRank(3), ramp=0.5)


def test_shares_and_steps() -> None:
    owner = OwnsTRP(rule=rp.Energy(0.9), ramp=0.25, freeze=30, include=["*"])
    trp = owner.start(nn.Sequential(nn.Linear(8, 8)), 50, None)
    assert (trp.schedule.ramp, trp.schedule.freeze) == (12, 30)
    assert owner.start(nn.Sequential(nn.Linear(8, 8)), 100, None).schedule.ramp == 25
    assert not OwnsTRP(rule=rp.Energy(0.9), ramp=3).needs_length


def test_a_wrong_name() -> None:
    with pytest.raises(TypeError, match="evry"):
        OwnsTRP(rule=rp.Energy(0.9), evry=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ramp": 0.5, "freeze": 0.3}, "freeze=0.3: freeze no earlier"),
        ({"ramp": 50, "freeze": 30}, "freeze=30: freeze no earlier"),
        ({"every": 0}, "every=0"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_training(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(rp.RankPruneError, match=message):
        OwnsTRP(rule=rp.Energy(0.9), **settings)


def test_a_missing_package_is_told_across_processes() -> None:
    error = rp.MissingExtraError("onnx", "onnx")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, rp.MissingExtraError)
    assert str(again) == str(error)


class Named(NamedTuple):
    x: torch.Tensor
    scale: int


def test_example_inputs_come_to_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    owner = OwnsTRP(rule=rp.Energy(0.9))
    monkeypatch.setattr("rankprune.integrations.callback.TRP", lambda model, **settings: given.update(settings))
    owner.start(nn.Linear(4, 4, device="meta"), 10, {"x": torch.zeros(1, 4)})
    assert given["example_inputs"]["x"].is_meta


def test_inputs_keep_their_kinds_on_another_device() -> None:
    moved = on_device({"x": (torch.zeros(2), [torch.zeros(3), 4])}, torch.device("meta"))
    assert moved["x"][0].is_meta
    assert moved["x"][1][0].is_meta
    assert moved["x"][1][1] == 4
    named = on_device(Named(torch.zeros(2), 4), torch.device("meta"))
    assert isinstance(named, Named)
    assert named.x.is_meta


def test_nothing_to_finalize() -> None:
    with pytest.raises(rp.RankPruneError, match="no training has started"):
        OwnsTRP(rule=rp.Energy(0.9)).finalize()


def test_ranks_costs_and_overhead_of_a_plain_loop_in_tensorboard(tmp_path: Path) -> None:
    model, data = toy.Net(), toy.Data()
    optimizer = toy.sgd(model)
    trp = rp.TRP(model, ramp=10, **toy.settings()).attach(optimizer)
    with SummaryWriter(tmp_path) as writer:
        for step in range(1, 21):
            model(data.x, data.labels)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % toy.EVERY == 0:
                for name, value in trp.metrics().items():
                    writer.add_scalar(name, value, step)
    toy.good_metrics(toy.scalars(tmp_path), trp.history)
    toy.really_projected(trp, 20)
