import itertools
import math
import time
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rankprune as rp
from rankprune.rules import Candidate, Choice, Cost, Energy, FixedRank, RankFraction, RankRule, SingularValue
from rankprune.rules import parse_rule as parse
from rankprune.rules.budget import Budget, _spent
from rankprune.spectrum import Spectrum

Layers = dict[str, list[Candidate]]


def candidate(values: Tensor, unit: int, dense: int, scheme: str = "channel", round_to: int = 1) -> Candidate:
    values = values.double().sort(descending=True).values
    return Candidate(scheme, Spectrum.of(values[None]), Cost(unit, 7 * unit), Cost(dense, 7 * dense), round_to)


def matrix_layer(values: Tensor, rows: int, columns: int) -> list[Candidate]:
    return [candidate(values, rows + columns, rows * columns)]


spectra = st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any)
stacks = st.integers(1, 8).flatmap(lambda k: st.lists(st.lists(st.integers(0, 9), min_size=k, max_size=k), min_size=1))


def descending(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).sort(1, descending=True).values


# -- local rules, against their definitions ---------------------------------------------------------------------------


def smallest_rank(values: Tensor, percent: int) -> int:
    """Energy's definition, in exact arithmetic on whole singular values."""
    energies = [sum(int(v) ** 2 for v in column) for column in values.T.tolist()]
    lost = Fraction(100 - percent, 100) * sum(energies)
    return max(1, next(r for r in range(len(energies) + 1) if sum(energies[r:]) <= lost))


@given(rows=stacks, percent=st.integers(1, 100))
def test_energy_takes_the_smallest_rank_that_keeps_enough(rows: list[list[int]], percent: int) -> None:
    values = descending(rows)
    assert Energy(keep=percent / 100).rank_of(Spectrum.of(values)) == smallest_rank(values, percent)


@pytest.mark.parametrize(("values", "percents"), [([3, 1], (90, 91)), ([2, 1], (80, 79)), ([7, 1, 1, 1, 0], (98, 96, 94))])
def test_energy_is_exact_where_the_kept_energy_is_just_enough(values: list[int], percents: tuple[int, ...]) -> None:
    spectrum = descending([values])
    for percent in percents:
        assert Energy(keep=percent / 100).rank_of(Spectrum.of(spectrum)) == smallest_rank(spectrum, percent), percent


@given(rows=stacks, minimum=st.integers(1, 10))
def test_singular_value_counts_those_that_reach_the_minimum(rows: list[list[int]], minimum: int) -> None:
    reached = sum(any(row[j] >= minimum for row in descending(rows).tolist()) for j in range(len(rows[0])))
    assert SingularValue(minimum).rank_of(Spectrum.of(descending(rows))) == max(1, reached)


@pytest.mark.parametrize("full", [1, 7, 25, 64, 100, 128])
def test_rank_fraction_rounds_up_the_exact_product(full: int) -> None:
    for percent in range(1, 101):
        rank = RankFraction(percent / 100).rank_of(Spectrum.of(torch.ones(1, full)))
        assert rank == math.ceil(Fraction(percent, 100) * full), percent


@given(full=st.integers(1, 20), rank=st.integers(1, 30))
def test_fixed_rank_is_cut_at_the_full_rank(full: int, rank: int) -> None:
    assert FixedRank(rank).rank_of(Spectrum.of(torch.ones(2, full))) == min(rank, full)


@pytest.mark.parametrize("rule", [Energy(0.5), SingularValue(1e-3), FixedRank(1), RankFraction(0.01)])
def test_a_zero_matrix_still_gets_rank_one(rule) -> None:
    assert rule.rank_of(Spectrum.of(torch.zeros(3, 6))) == 1


# -- break-even, rounding, the choice of scheme -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "unit", "full", "last_cheaper"), [("channel", 160, 16, 14), ("spatial", 96, 48, 23), ("any", 1, 9, 9)]
)
def test_a_pair_that_is_not_cheaper_stays_dense(scheme: str, unit: int, full: int, last_cheaper: int) -> None:
    layers = {"layer": [candidate(torch.arange(full) + 1, unit, 16 * 16 * 9, scheme)]}
    for rank in range(1, full + 1):
        choice = FixedRank(rank).choose(layers, Cost(9999, 9999))["layer"]
        if rank <= last_cheaper:
            assert choice == Choice(scheme, rank)
        else:
            assert choice.rank is None
            assert f"rank {rank} of {full} costs {rank * unit} MACs, dense 2304" in choice.reason


@pytest.mark.parametrize(
    ("rank", "round_to", "expected"),
    [(1, 1, 1), (1, 4, 4), (4, 4, 4), (5, 4, 8), (8, 4, 8), (9, 4, 10), (3, 16, 10), (3, 8, 8)],
)
def test_ranks_are_rounded_up_to_a_multiple_or_the_full_rank(rank: int, round_to: int, expected: int) -> None:
    layer = [candidate(torch.ones(10), 1, 1000, round_to=round_to)]
    assert FixedRank(rank).choose({"layer": layer}, Cost(1000, 7000))["layer"].rank == expected


@pytest.mark.parametrize(("fraction", "rank"), [(0.29, 29), (0.57, 57), (0.299, 29), (0.58, 58)])
def test_a_fraction_is_what_it_says_in_decimals(fraction: float, rank: int) -> None:
    layer = [candidate(torch.ones(100), 1, 100)]  # 0.29 * 100 is 28.999999999999996
    assert Budget(macs=fraction).choose({"layer": layer}, Cost(100, 700))["layer"].rank == rank


def test_break_even_is_judged_after_rounding() -> None:
    layer = [candidate(torch.ones(10), 10, 60, round_to=4)]
    assert FixedRank(4).choose({"layer": layer}, Cost(60, 420))["layer"].rank == 4
    assert FixedRank(5).choose({"layer": layer}, Cost(60, 420))["layer"].rank is None


@given(data=st.data(), keep=st.sampled_from([0.5, 0.9, 0.99]))
def test_auto_takes_the_scheme_that_is_cheapest_at_the_rules_own_rank(data: st.DataObject, keep: float) -> None:
    schemes = [candidate(torch.tensor(data.draw(spectra)), data.draw(st.integers(1, 30)), 100, name) for name in "abc"]
    costs = {c.scheme: Energy(keep).rank_of(c.spectrum) * c.unit.macs for c in schemes}
    choice = Energy(keep).choose({"layer": schemes}, Cost(100, 700))["layer"]
    if min(costs.values()) >= 100:
        assert choice.reason is not None
        assert choice.rank is None or choice.rank < next(c.full_rank for c in schemes if c.scheme == choice.scheme)
    else:
        assert costs[choice.scheme] == min(costs.values())


@pytest.mark.parametrize(("values", "rank"), [([20.0] * 12, 6), ([20.0, 1.0, 1.0], 1), ([20.0], None)])
def test_a_threshold_holds_layers_whose_pair_would_not_pay_below_full_rank(values: list[float], rank: int | None) -> None:
    choice = Energy(0.5).choose({"layer": [candidate(torch.tensor(values), 200, 100)]}, Cost(100, 700))["layer"]
    assert choice.reason is not None
    assert choice.rank == rank


def test_without_mac_counts_cheaper_means_fewer_parameters() -> None:
    values = torch.ones(1, 4)
    small = Candidate("small", Spectrum.of(values), Cost(None, 5), Cost(None, 100))
    big = Candidate("big", Spectrum.of(values), Cost(None, 6), Cost(None, 100))
    assert FixedRank(2).choose({"layer": [big, small]}, Cost(None, 100))["layer"].scheme == "small"
    with pytest.raises(rp.RankPruneError, match="example_inputs"):
        Budget(macs=0.5).choose({"layer": [big, small]}, Cost(None, 100))


# -- budget -----------------------------------------------------------------------------------------------------------


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
            candidate(torch.tensor(draw(spectra)), draw(st.integers(1, 15)), dense, f"scheme{j}")
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


# -- bad input, text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        *[(lambda v=v: Energy(keep=v), f"keep={v}") for v in (0, 1.5, -0.1, math.nan)],
        *[(lambda v=v: SingularValue(minimum=v), f"minimum={v}") for v in (0, -1.0, math.nan)],
        *[(lambda v=v: FixedRank(rank=v), f"rank={v}") for v in (0, -3, 2.5, math.nan)],
        *[(lambda v=v: RankFraction(fraction=v), f"fraction={v}") for v in (0, 1.01, -1, math.nan)],
        *[(lambda v=v: Budget(macs=v), f"macs={v}") for v in (0, 1.2, -1, math.nan)],
        *[(lambda v=v: Budget(params=v), f"params={v}") for v in (0, 1.2, -1, math.inf)],
        *[(lambda v=v: Budget(macs=0.5, size_power=v), f"size_power={v!r}") for v in ("1", True, -1, math.nan, math.inf)],
        (Budget, "exactly one of macs=, params= and latency="),
        (lambda: Budget(macs=0.4, params=0.4), "exactly one of macs=, params= and latency="),
    ],
)
def test_a_value_out_of_range_is_named(make, named: str) -> None:
    with pytest.raises(rp.RankPruneError) as raised:
        make()
    assert named in str(raised.value)


@pytest.mark.parametrize("rule", [Energy(0.98), SingularValue(1e-3), FixedRank(4), RankFraction(0.25)])
@pytest.mark.parametrize("also", [Budget(macs=1 / 2.2), Budget(params=0.5)])
def test_text_round_trips(rule: RankRule, also: RankRule) -> None:
    assert parse(repr(rule)) == rule
    assert parse(f"  {also!r} ") == also
    with pytest.raises(FrozenInstanceError):
        rule.keep = 1  # type: ignore[attr-defined]


def test_text_may_hold_fractions() -> None:
    assert parse("Budget(macs=1/2.2)") == Budget(macs=1 / 2.2)


def test_the_first_value_needs_no_name() -> None:
    assert parse("FixedRank(8)") == FixedRank(8)
    assert parse("Energy(9/10)") == Energy(keep=0.9)


@pytest.mark.parametrize(
    "make", [lambda: Energy("0.9"), lambda: FixedRank(True), lambda: Budget(macs="1"), lambda: SingularValue(None)]
)
def test_values_that_are_no_numbers_are_refused(make) -> None:
    with pytest.raises(rp.RankPruneError):
        make()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Energy",
        "Energy(0.9, keep=0.9)",
        "Energy(keep=)",
        "Energy(kept=0.9)",
        "Energy(keep='0.9')",
        "Energy(keep=None)",
        "Energy(keep=1/0)",
        "Energy(keep=2**9)",
        "Energy(keep=len([1]))",
        "Energy(**{'keep': 0.9})",
        "Tucker(rank=3)",
        "Energy(keep=0.9).__class__()",
        "__import__('os').getcwd()",
        "(lambda: Energy(keep=0.9))()",
        "Energy(keep=0.9); Energy(keep=0.8)",
        "Energy(keep=__import__('os').getpid())",
        "Energy(keep=2)",
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(rp.RankPruneError):
        parse(text)


@pytest.mark.parametrize("rule", [Energy(0.9), Budget(macs=0.4), Budget(params=0.3)])
def test_annealing_runs_from_everything_to_the_rule(rule: RankRule) -> None:
    share = (lambda r: r.keep) if isinstance(rule, Energy) else (lambda r: r.fraction)
    assert [share(rule.relaxed(p)) for p in (0.0, 0.5, 1.0)] == pytest.approx([1, (1 + share(rule)) / 2, share(rule)])
    assert type(rule.relaxed(0.5)) is type(rule)
    assert rule.relaxed(0.5).metric == rule.metric


@pytest.mark.parametrize("rule", [FixedRank(3), SingularValue(0.1), RankFraction(0.5)])
def test_a_rule_that_cannot_be_annealed_says_so(rule: RankRule) -> None:
    with pytest.raises(rp.RankPruneError, match="annealed"):
        rule.relaxed(0.5)


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
