"""Rank rules: all spectra of a network in, one decision per layer out.

A rule sees every layer under every scheme that may be used for it (a Candidate each), and answers with a scheme and a rank,
or with the reason why the layer stays dense. Ranks are at least 1, and a pair that is not cheaper than its layer is
never chosen.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

from rankprune.errors import RankPruneError
from rankprune.spectrum import Spectrum

Metric = Literal["macs", "params", "latency"]


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_share(value: object) -> bool:
    """Whether a value is a number above 0 and at most 1."""
    return is_number(value) and 0 < value <= 1


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates (None where no example inputs were given to count on), parameters, nanoseconds where measured."""

    macs: int | None
    params: int
    ns: int | None = None

    @property
    def known(self) -> Metric:
        """What "cheaper" means where no rule says: MACs if they were counted."""
        return "params" if self.macs is None else "macs"

    def of(self, metric: Metric) -> int:
        """The figure a rule counts in.

        Raises:
            RankPruneError: for MACs that were not counted, or times not measured.
        """
        value = {"params": self.params, "macs": self.macs, "latency": self.ns}[metric]
        if value is None:
            what = "needs times" if metric == "latency" else "counts MACs"
            raise RankPruneError(f"this rule {what}: give example_inputs=, one batch as the model is called with")
        return value


def break_even(dense: Cost, unit: Cost, metric: Metric) -> int:
    """The largest rank at which a pair of `unit` for each rank is cheaper than the layer."""
    return (dense.of(metric) - 1) // max(unit.of(metric), 1)


@dataclass(frozen=True)
class Candidate:
    """One layer under one scheme.

    `unit` is the cost of each rank (MACs and parameters are proportional to the rank, a bias aside); `dense` the cost of the
    layer as it is, bias not counted; ranks are multiples of `round_to`, or full. `pair_ns` are nanoseconds at the ranks that
    were measured; rules that go by time choose among these.
    """

    scheme: str
    spectrum: Spectrum
    unit: Cost
    dense: Cost
    round_to: int = 1
    pair_ns: Mapping[int, int] | None = None

    @property
    def full_rank(self) -> int:
        """The largest rank, k."""
        return self.spectrum.full_rank

    def cost(self, rank: int) -> Cost:
        """What a pair of that rank costs, bias not counted; in nanoseconds where it was measured."""
        macs = None if self.unit.macs is None else rank * self.unit.macs
        return Cost(macs, rank * self.unit.params, None if self.pair_ns is None else self.pair_ns.get(rank))

    def costs(self, metric: Metric) -> dict[int, int]:
        """The cost at each rank that may be chosen and is cheaper than the layer as it is."""
        dense = self.dense.of(metric)
        if metric == "latency":
            measured = self.pair_ns or {}
            return {r: ns for r, ns in measured.items() if ns < dense and r <= self.full_rank and r % self.round_to == 0}
        unit = self.unit.of(metric)
        affordable = min(self.full_rank, break_even(self.dense, self.unit, metric))
        ranks = list(range(self.round_to, affordable + 1, self.round_to))
        if self.full_rank == affordable and affordable % self.round_to:
            ranks.append(affordable)
        return {rank: rank * unit for rank in ranks}

    def rounded(self, rank: int) -> int:
        """`rank` rounded up to a multiple of round_to, between 1 and the full rank."""
        return max(1, min(math.ceil(rank / self.round_to) * self.round_to, self.full_rank))


@dataclass(frozen=True)
class Choice:
    """What a rule says of one layer: a scheme and a rank, or the reason why it stays dense.

    With both it stays dense, and projections hold its weight at that rank.
    """

    scheme: str | None = None
    rank: int | None = None
    reason: str | None = None


def check_rule(rule: object, ramp: float = 0) -> None:
    """Make sure that a rule is one, and can be annealed where there is a ramp.

    Raises:
        RankPruneError: if not.
    """
    if not isinstance(rule, RankRule):
        raise RankPruneError(f"rule={rule!r} is not a rank rule; use one like Energy(keep=0.98) or Budget(macs=0.5)")
    if ramp:
        rule.relaxed(0.5)


class RankRule(ABC):
    """Chooses the rank of every layer of a network."""

    metric: Metric | None = None
    """The cost that the rule needs to know; None if it needs none."""
    backend: str = "eager"
    """What runs the network where its latency counts: a name in rankprune.backends.BACKENDS."""
    threads: int | None = None
    """How many the backend may use; None means as many as it takes by itself."""

    @property
    def needs_inputs(self) -> bool:
        """Whether that cost is had only by running the model."""
        return self.metric in ("macs", "latency")

    @abstractmethod
    def choose(self, layers: Mapping[str, Sequence[Candidate]], network: Cost) -> dict[str, Choice]:
        """One Choice for each of `layers`, and for no other.

        Also asked, before any training, of spectra in which all singular values are equal: what it raises there, like that
        a budget cannot be met, is raised by TRP and make_plan.

        Args:
            layers: the candidates of each layer, one per scheme, at least one.
            network: the cost of the whole dense model, layers that stay dense included.
        """

    def relaxed(self, progress: float) -> "RankRule":
        """The rule part-way from "keep everything" (0) to itself (1), for annealing during training.

        Raises:
            RankPruneError: if the rule has no such path.
        """
        raise RankPruneError(f"{self!r} cannot be annealed; use one that can, like Budget or Energy, or ramp=0")
