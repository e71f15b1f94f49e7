import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rankprune as rp
from rankprune.rules import Candidate, Cost
from rankprune.spectrum import Spectrum


def part(values: torch.Tensor, known: int) -> Spectrum:
    return Spectrum(values[:, :known], values.square().sum(-1), values.shape[-1])


values = st.lists(st.integers(0, 9), min_size=2, max_size=9).map(lambda v: torch.tensor([sorted(v, reverse=True)]).double())


def test_errors_fall_from_one_to_zero() -> None:
    errors = Spectrum.of(torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])).errors()
    assert errors.tolist() == pytest.approx([1.0, 0.2, 0.0, 0.0])


@given(values, st.integers(1, 8))
def test_known_figures_are_exact_and_others_are_bounds(v: torch.Tensor, known: int) -> None:
    known = min(known, v.shape[-1])
    whole, some = Spectrum.of(v).errors(), part(v, known).errors()
    assert some.shape == whole.shape
    assert torch.allclose(some[: known + 1], whole[: known + 1])
    assert (some <= whole + 1e-12).all()
    assert some[-1] == 0


@given(values, st.integers(1, 8), st.sampled_from([rp.Energy(0.9), rp.Energy(0.5), rp.SingularValue(4.0), rp.FixedRank(2)]))
def test_a_rule_asks_for_more_or_answers_as_if_it_knew_all(v: torch.Tensor, known: int, rule) -> None:
    known = min(known, v.shape[-1])
    asked, answer = rule.rank_of(part(v, known)), rule.rank_of(Spectrum.of(v))
    if asked <= known:
        assert asked == answer
    elif not isinstance(rule, rp.SingularValue):  # which asks again where all known values reach its minimum
        assert answer > known


@given(st.lists(values, min_size=1, max_size=4), st.integers(1, 8), st.floats(0.2, 1.0))
def test_a_budget_that_asks_for_no_more_chooses_as_if_it_knew_all(layers, known: int, fraction: float) -> None:
    def choose(spectra: list[Spectrum]) -> dict:
        candidates = {
            str(i): [Candidate("channel", s, Cost(3, 3), Cost(2 * s.full_rank + 3, 2 * s.full_rank + 3))]
            for i, s in enumerate(spectra)
        }
        total = sum(c[0].dense.params for c in candidates.values())
        return rp.Budget(macs=fraction).choose(candidates, Cost(total, total))

    some = [part(v, min(known, v.shape[-1])) for v in layers]
    try:
        chosen = choose(some)
    except rp.RankPruneError:
        with pytest.raises(rp.RankPruneError):
            choose([Spectrum.of(v) for v in layers])
        return
    whole = choose([Spectrum.of(v) for v in layers])
    if all((c.rank or 0) <= s.known for c, s in zip(chosen.values(), some, strict=True)):

        def error(choices: dict) -> float:
            return sum(
                float(Spectrum.of(v).errors()[c.rank]) if c.rank else 0.0 for v, c in zip(layers, choices.values(), strict=True)
            )

        assert error(chosen) == pytest.approx(error(whole), abs=0.05)
