"""Budget(latency=): what it chooses and what it asks for."""

import sys

import pytest
import torch

import rankprune as rp
from own_clock import budget, network
from rankprune.rules import Candidate, Cost, parse_rule
from rankprune.spectrum import Spectrum

pytestmark = pytest.mark.usefixtures("cache_by_own_clock")


def candidate(values: list[float], dense: int, pair_ns: dict[int, int], scheme: str = "channel") -> Candidate:
    spectrum = Spectrum.of(torch.tensor([values], dtype=torch.float64))
    return Candidate(scheme, spectrum, Cost(1, 1), Cost(100, 100, dense), 1, pair_ns)


def test_only_ranks_that_were_measured_and_are_faster_are_chosen() -> None:
    layers = {
        "better": [candidate([4.0, 3, 2, 1], 100, {1: 120, 2: 40, 3: 90, 4: 150})],
        "slower": [candidate([4.0, 1, 1, 1], 50, {1: 50, 2: 60, 4: 70})],
    }
    chosen = rp.Budget(latency=0.95).choose(layers, Cost(1, 1, 200))
    assert (chosen["better"].scheme, chosen["better"].rank) == ("channel", 3)
    assert chosen["slower"].rank is None
    chosen = rp.Budget(latency=0.75).choose(layers, Cost(1, 1, 200))
    assert chosen["better"].rank == 2


def test_the_scheme_is_the_one_that_keeps_more_in_the_same_time() -> None:
    layers = {"layer": [candidate([2.0, 1, 1], 100, {1: 50}), candidate([2.0, 1, 1], 100, {2: 50}, "spatial")]}
    assert rp.Budget(latency=0.5).choose(layers, Cost(1, 1, 100))["layer"].scheme == "spatial"


def test_a_latency_that_cannot_be_met_is_refused() -> None:
    layers = {"layer": [candidate([2.0, 1], 100, {1: 50})]}
    with pytest.raises(rp.RankPruneError, match=r"0\.500 of the latency remain"):
        rp.Budget(latency=0.4).choose(layers, Cost(1, 1, 100))


@pytest.mark.parametrize(
    "text", ["Budget(latency=0.5, backend='onnxruntime')", "Budget(latency=0.5, backend='eager', threads=2)"]
)
def test_the_rule_is_read_from_its_text(text: str) -> None:
    assert repr(parse_rule(text)) == text


def test_what_the_rule_needs_is_asked_for() -> None:
    with pytest.raises(rp.RankPruneError, match="no backend 'tpu'"):
        rp.Budget(latency=0.5, backend="tpu")
    with pytest.raises(rp.RankPruneError, match="needs times: give example inputs"):
        rp.make_plan(network()[0], rule=budget(0.5))


@pytest.mark.parametrize("threads", [0, -3, "a", 1.5])
def test_threads_are_a_whole_number(threads: object) -> None:
    with pytest.raises(rp.RankPruneError, match="threads="):
        rp.Budget(latency=0.5, threads=threads)  # type: ignore[arg-type]


def test_ranks_are_multiples_where_that_is_asked_for() -> None:
    model, x = network()
    plan = rp.make_plan(model, x, rule=budget(0.7), round_to=7)
    assert plan.ranks
    assert all(rank % 7 == 0 for rank in plan.ranks.values())


def test_a_backend_that_is_missing_offers_a_budget_of_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    model, x = network()
    with pytest.raises(rp.MissingExtraError, match=r"rankprune\[openvino\].*Budget\(macs=0.5\)"):
        rp.make_plan(model, x, rule=rp.Budget(latency=0.5, backend="openvino"))
