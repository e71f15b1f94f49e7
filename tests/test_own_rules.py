"""Rank rules that users write themselves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import own_clock
import rankprune as rp
from rankprune.rules import Choice, LocalRule, RankRule
from rankprune.spectrum import Spectrum


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


@dataclass(frozen=True)
class Own(RankRule):
    """Chooses the same for one layer whatever it is asked."""

    scheme: str
    rank: Any
    layer: str = "0"

    def choose(self, layers: Mapping, network: object) -> dict[str, Choice]:
        return {name: Choice() for name in layers} | {self.layer: Choice(self.scheme, self.rank)}


@pytest.mark.parametrize(
    "rule", [Own("linear", 17), Own("linear", 0), Own("linear", -1), Own("linear", 2.0), Own("spatial", 2)]
)
def test_it_is_held_to_what_it_could_choose(rule: Own) -> None:
    said = rf"Own\(.*chose {rule.scheme} at rank {rule.rank} for layer '0'; it could choose linear at ranks 1 to 16"
    with pytest.raises(rp.RankPruneError, match=said):
        rp.make_plan(network(), rule=rule, include=["*"])


def test_a_pair_that_is_not_cheaper_is_never_made() -> None:
    plan = rp.make_plan(network(), rule=Own("linear", 16), include=["*"])
    assert plan.ranks == {}
    assert plan.skipped["0"] == "linear at rank 16 of 16, as Own(scheme='linear', rank=16, layer='0') chose, is not cheaper"
    assert plan.params == plan.params_dense


def test_it_may_count_as_numpy_does() -> None:
    plan = rp.make_plan(network(), rule=Own("linear", np.int64(3)), include=["*"])
    assert plan.ranks == {"0": 3}
    assert rp.Plan.from_json(plan.to_json()) == plan


def test_it_chooses_for_every_layer_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(rp.RankPruneError, match=r"no other: see \['9'\]"):
        rp.make_plan(network(), rule=Own("linear", 2, "9"), include=["*"])
    plan = rp.make_plan(network(), rule=Own("linear", 2), include=["*"])
    assert plan.skipped["2"] == "Own(scheme='linear', rank=2, layer='0') leaves it dense"
    monkeypatch.setattr(Own, "choose", lambda *_: {"0": Choice("linear", 2)})
    with pytest.raises(rp.RankPruneError, match=r"no other: see \['2'\]"):
        rp.make_plan(network(), rule=Own("linear", 2), include=["*"])
    for chosen in (["0", "2"], {"0": 3, "2": None}):
        monkeypatch.setattr(Own, "choose", lambda *_, chosen=chosen: chosen)
        with pytest.raises(rp.RankPruneError, match="a dict of one Choice for each layer"):
            rp.make_plan(network(), rule=Own("linear", 2), include=["*"])


class LargestGap(LocalRule):
    """Has to see all singular values."""

    metric = "params"

    def rank_of(self, spectrum: Spectrum) -> int | None:
        if spectrum.known < spectrum.full_rank:
            return None
        values = spectrum.values.square().mean(0)
        return 1 + int((values[:-1] / values[1:].clamp(min=1e-9)).argmax())


def test_it_may_ask_for_all_singular_values() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    trp = rp.TRP(model, rule=LargestGap(), include=["*"])
    asked = []
    for rank in (9, 30):  # at the second projection leading vectors are known, which say nothing of a gap behind them
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.weight.copy_(torch.randn(512, rank) @ torch.randn(rank, 512))
        plan = trp.project()
        assert plan.ranks == {"0": rank, "2": rank}
        asked.append(trp._iteration._starts)
    assert asked[0], "the second projection starts from the first one's vectors"


def test_schemes_compare_by_its_metric() -> None:
    model, x = nn.Sequential(nn.Conv2d(16, 16, 3, stride=4, padding=1)), torch.randn(1, 16, 16, 16)
    rules = rp.FixedRank(1), type("ByParams", (rp.FixedRank,), {"metric": "params"})(1)
    plans = [rp.make_plan(model, x, rule=rule, scheme="auto", include=["*"]).decomposed["0"] for rule in rules]
    assert plans[0].macs_after < plans[1].macs_after
    assert plans[0].params_after > plans[1].params_after


@pytest.mark.parametrize("rule", [rp.Energy(0.8), rp.Budget(params=0.5)], ids=lambda rule: type(rule).__name__)
def test_on_its_ramp_a_rule_derived_from_another_stays_what_it_is(rule: RankRule) -> None:
    kind = type("Derived", (type(rule),), {"metric": "params"})
    relaxed = kind(**vars(rule)).relaxed(0.5)
    assert type(relaxed) is kind
    assert vars(relaxed) == vars(rule.relaxed(0.5)) != vars(rule)


def test_one_layer_alone_has_no_latency() -> None:
    with pytest.raises(rp.RankPruneError, match=r"Clocked cannot go by latency.* derive it from RankRule"):
        type("Clocked", (rp.FixedRank,), {"metric": "latency"})


class Fastest(RankRule):
    """The fastest rank that was timed of every layer, or one that was not."""

    metric, backend = "latency", own_clock.Timeless.name

    def __init__(self, beside: int = 0) -> None:
        self.beside = beside

    def choose(self, layers: Mapping, network: object) -> dict[str, Choice]:
        return {name: Choice("linear", min(c.pair_ns, key=c.pair_ns.get) + self.beside) for name, (c,) in layers.items()}


def test_it_may_go_by_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    own_clock.use(monkeypatch)
    own_clock.add(monkeypatch, own_clock.Timeless())
    model, x = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96)), torch.randn(1, 96)
    plan = rp.make_plan(model, x, rule=Fastest(), include=["*"])
    assert plan.ranks.keys() == {"0", "2"}
    assert plan.ms < plan.ms_dense
    assert plan.setting.backend == "timeless"
    with pytest.raises(rp.RankPruneError, match=r"could choose linear at ranks \[\d+, "):
        rp.make_plan(model, x, rule=Fastest(beside=1), include=["*"])
