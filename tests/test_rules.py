import math
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rankprune as rp
from rankprune.rules import Candidate, Choice, Cost, Energy, FixedRank, RankFraction, RankRule, SingularValue
from rankprune.rules import parse_rule as parse
from rankprune.rules.budget import Budget
from rankprune.spectrum import Spectrum
from rule_candidates import SPECTRA, candidate

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
    schemes = [candidate(torch.tensor(data.draw(SPECTRA)), data.draw(st.integers(1, 30)), 100, name) for name in "abc"]
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
