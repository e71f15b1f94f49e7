"""A budget for the whole network is kept, and spent as well as it can be."""

import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rankprune as rp
from rankprune.rules import Candidate, Choice, Cost
from rankprune.rules import parse_rule as parse
from rankprune.rules.budget import Budget, _spent
from rankprune.spectrum import Spectrum
from rule_candidates import SPECTRA, Layers, candidate, matrix_layer


def options(candidates: list[Candidate], power: float = 0) -> list[tuple[int, float, Choice]]:
    """(cost, weighted error, choice) of all that may be done with a layer, by definition."""
    weight = candidates[0].dense.params ** power
    found = [(candidates[0].dense.macs, 0.0, Choice())]
    for c in candidates:
        energies = c.spectrum.values.square().sum(0).tolist()
        for rank in range(1, len(energies) + 1):
            if rank * c.unit.macs < c.dense.macs:
                error = weight * sum(energies[rank:]) / (sum(energies) or 1)
                found.append((rank * c.unit.macs, error, Choice(c.scheme, rank)))
    return found


def outcome(layers: Layers, choices: dict[str, Choice], power: float = 0) -> tuple[int, float]:
    """The total cost and error of a decision."""
    picked = [
        next(o for o in options(layers[name], power) if (o[2].scheme, o[2].rank) == (choice.scheme, choice.rank))
        for name, choice in choices.items()
    ]
    return sum(cost for cost, *_ in picked), sum(error for _, error, _ in picked)


@st.composite
def networks(draw: st.DrawFn, most_layers: int = 3, schemes: int = 2) -> tuple[Layers, int]:
    """A small network, and the cost of what is no layer of it."""
    layers = {}
    for i in range(draw(st.integers(1, most_layers))):
        dense = draw(st.integers(4, 60))
        layers[f"layer{i}"] = [
            candidate(torch.tensor(draw(SPECTRA)), draw(st.integers(1, 15)), dense, f"scheme{j}")
            for j in range(draw(st.integers(1, schemes)))
        ]
    return layers, draw(st.integers(0, 50))


def allowed_and_network(layers: Layers, rest: int, fraction: float) -> tuple[int, Cost]:
    whole = rest + sum(c[0].dense.macs for c in layers.values())
    return math.floor(fraction * whole) - rest, Cost(whole, 7 * whole)


@settings(max_examples=120)
@given(case=networks(), fraction=st.floats(0.2, 1.0), power=st.sampled_from([0, 0.5, 1]))
def test_the_budget_is_kept_and_well_spent(case: tuple[Layers, int], fraction: float, power: float) -> None:
    layers, rest = case
    rule = Budget(macs=fraction, size_power=power)
    allowed, network = allowed_and_network(layers, rest, fraction)
    rows = [options(c, power) for c in layers.values()]
    if sum(min(cost for cost, *_ in row) for row in rows) > allowed:
        with pytest.raises(rp.RankPruneError, match="cannot be met"):
            rule.choose(layers, network)
        return
    choices = rule.choose(layers, network)
    cost, error = outcome(layers, choices, power)
    assert cost <= allowed

    for name in layers:  # no change of one layer gains and still fits
        for alternative in (o[2] for o in options(layers[name], power)):
            new_cost, new_error = outcome(layers, choices | {name: alternative}, power)
            assert new_cost > allowed or new_error >= error - 1e-9

    slopes = {abs((a[1] - b[1]) / (a[0] - b[0])) for row in rows for a in row for b in row if a[0] != b[0]}
    steps = sorted({1e-12, *slopes, 1000.0})
    bound, by_multiplier = 0.0, math.inf  # no better than any allocation by one multiplier, no worse than the best one
    for multiplier in [x for a, b in itertools.pairwise(steps) for x in (a, (a + b) / 2)]:
        picks = [min(row, key=lambda o: o[1] + multiplier * o[0]) for row in rows]
        spent, lost = sum(o[0] for o in picks), sum(o[1] for o in picks)
        bound = max(bound, lost + multiplier * (spent - allowed))
        if spent <= allowed:
            by_multiplier = min(by_multiplier, lost)
    assert bound - 1e-9 <= error <= by_multiplier + 1e-9
    best = min(sum(o[1] for o in picks) for picks in itertools.product(*rows) if sum(o[0] for o in picks) <= allowed)
    assert best - 1e-9 <= error <= best + (by_multiplier - bound) + 1e-9


def decaying(seed: int, count: int = 30) -> Layers:
    """Layers of different sizes and decays, like those of a real network."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for i in range(count):
        rows, columns = (int(x) for x in torch.randint(8, 64, (2,), generator=generator))
        decay = 0.7 + 0.29 * float(torch.rand((), generator=generator))
        layers[f"layer{i}"] = matrix_layer(decay ** torch.arange(min(rows, columns)), rows, columns)
    return layers


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_budget_never_costs_accuracy_and_is_used_within_two_percent(seed: int) -> None:
    layers, before = decaying(seed), math.inf
    for percent in range(10, 100, 5):
        allowed, network = allowed_and_network(layers, 100, percent / 100)
        cost, error = outcome(layers, Budget(macs=percent / 100).choose(layers, network))
        assert 0.98 * allowed <= cost <= allowed
        assert error <= before
        before = error


def test_the_budget_can_be_in_parameters() -> None:
    layers = decaying(0)
    allowed, network = allowed_and_network(layers, 100, 0.4)
    by_params = Budget(params=0.4).choose(layers, Cost(None, network.params))
    assert by_params == Budget(macs=0.4).choose(layers, network)  # here params are 7 times the MACs throughout
    assert outcome(layers, by_params)[0] <= allowed


def test_the_higher_the_power_of_the_size_the_more_is_left_of_large_layers() -> None:
    def square(k: int, places: int) -> list[Candidate]:  # a layer that is applied at so many places
        unit, dense = Cost(2 * k * places, 2 * k), Cost(k * k * places, k * k)
        return [Candidate("channel", Spectrum.of(0.9 ** torch.arange(k)[None]), unit, dense)]

    layers, network = {"small": square(32, 4), "large": square(64, 1)}, Cost(2 * 4096, 1024 + 4096)
    chosen = [Budget(macs=0.3, size_power=power).choose(layers, network) for power in (0, 0.5, 1)]
    small, large = ([choices[name].rank for choices in chosen] for name in ("small", "large"))
    assert small[0] > small[1] > small[2]
    assert large[0] < large[1] < large[2]
    assert Budget(macs=0.5, size_power=0.5).relaxed(0.5) == Budget(macs=0.75, size_power=0.5)
    assert parse("Budget(macs=0.5, size_power=1)") == Budget(macs=0.5, size_power=1)


def test_the_whole_budget_keeps_every_layer_dense() -> None:
    layers = decaying(0)
    choices = Budget(macs=1.0).choose(layers, allowed_and_network(layers, 100, 1.0)[1])
    assert all(choice.rank is None and choice.reason for choice in choices.values())


def test_a_budget_never_takes_a_pair_that_only_breaks_even() -> None:
    layers = {"layer": [candidate(torch.ones(10), 10, 100)]}  # at its full rank it costs 100 of 100
    ranks = [Budget(macs=p / 100).choose(layers, Cost(100, 700))["layer"].rank for p in (89, 90, 99, 100)]
    assert ranks == [8, 9, 9, None]


def test_a_budget_below_the_least_ranks_is_refused_and_says_what_remains() -> None:
    layers = {"layer": matrix_layer(torch.ones(10), 10, 10)}  # at rank 1 it costs 20 of 100
    with pytest.raises(rp.RankPruneError, match=r"Budget\(macs=0.59\) cannot be met.*0\.600 of the macs"):
        Budget(macs=0.59).choose(layers, Cost(200, 200))
    assert Budget(macs=0.6).choose(layers, Cost(200, 200))["layer"].rank == 1


def test_a_budget_rounds_ranks_too() -> None:
    layers = {"layer": [candidate(0.9 ** torch.arange(30), 2, 100, round_to=8)]}
    ranks = {Budget(macs=p / 100).choose(layers, Cost(100, 700))["layer"].rank for p in range(16, 100)}
    assert ranks == {8, 16, 24, 30}


def test_a_budget_over_a_hundred_large_layers_takes_no_time() -> None:
    layers = {str(i): matrix_layer((0.98 + i * 1e-4) ** torch.arange(512), 512, 4608) for i in range(100)}
    network = Cost(100 * 512 * 4608, 7 * 100 * 512 * 4608)
    begin = time.process_time()  # of this process, so that a busy machine fails no test
    Budget(macs=0.45).choose(layers, network)
    assert time.process_time() - begin < 5.0  # it takes a fifth of a second


@pytest.mark.parametrize("seed", range(20))
def test_what_a_budget_has_left_goes_to_the_change_that_gains_most_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(1, 60, (6, 9), generator=generator).double()
    errors = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    costs[0, 5:] = errors[0, 5:] = math.inf  # a layer with fewer options
    picks, allowed = costs.argmin(1), 150.0
    expected = picks.clone()

    def total() -> float:
        return float(costs.gather(1, expected[:, None]).sum())

    while True:
        gain, step = errors.gather(1, expected[:, None]) - errors, costs - costs.gather(1, expected[:, None])
        rate = torch.where((gain > 0) & (step <= allowed - total()), gain / step.clamp(min=1e-9), 0.0)
        best = int(rate.argmax())
        if rate.view(-1)[best] <= 0:
            break
        expected[best // 9] = best % 9
    assert torch.equal(_spent(picks, costs, errors, allowed - float(costs.gather(1, picks[:, None]).sum())), expected)
    assert not torch.equal(picks, expected)
