"""Rank rules that look at one layer at a time."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from rankprune.errors import RankPruneError
from rankprune.rules.base import Candidate, Choice, Cost, RankRule, is_share
from rankprune.spectrum import Spectrum

_ROUNDING = 1e-12
"""How far off a decimal fraction may be in binary; 0.9 of ten ranks is nine."""


class LocalRule(RankRule):
    """A rule that looks at one layer at a time; among schemes the cheapest wins, at the rank the rule gives each."""

    holds: ClassVar[bool] = False
    """Whether projections hold a layer at its rank also where a pair would not be cheaper, so that its rank can fall."""

    def __init_subclass__(cls) -> None:
        if cls.metric == "latency":
            raise RankPruneError(f"{cls.__name__} cannot go by latency, which no rank has by itself; derive it from RankRule")

    @abstractmethod
    def rank_of(self, spectrum: Spectrum) -> int | None:
        """The rank for these singular values.

        In training only the leading ones may be known. A rank above spectrum.known says that it is at least that, and asks for
        all if the layer would get it; None, that it takes all of them to say anything.
        """

    def choose(self, layers: Mapping[str, Sequence[Candidate]], network: Cost) -> dict[str, Choice]:
        return {name: self._choose(candidates) for name, candidates in layers.items()}

    def _choose(self, candidates: Sequence[Candidate]) -> Choice:
        ranked = []
        for c in candidates:
            rank = self.rank_of(c.spectrum)
            if rank is None:
                return Choice(c.scheme, c.spectrum.known + 1)
            ranked.append((c, c.rounded(rank)))
        metric = self.metric or candidates[0].dense.known
        best, rank = min(ranked, key=lambda pair: pair[0].cost(pair[1]).of(metric))
        cost, dense = best.cost(rank).of(metric), best.dense.of(metric)
        if cost >= dense:
            unit = "MACs" if metric == "macs" else "parameters"
            reason = f"{best.scheme} at rank {rank} of {best.full_rank} costs {cost} {unit}, dense {dense}"
            return Choice(best.scheme, rank, reason) if self.holds and rank < best.full_rank else Choice(reason=reason)
        return Choice(best.scheme, rank)


@dataclass(frozen=True)
class Energy(LocalRule):
    """The smallest rank that keeps the share `keep` of each layer's squared singular values (TRP's energy threshold).

    Every layer is projected to its rank, as in TRP, also where a pair of that rank would cost more than the layer.

    >>> import torch
    >>> Energy(keep=0.9).rank_of(Spectrum.of(torch.tensor([[3.0, 1.0, 0.0]])))
    1
    """

    keep: float
    holds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not is_share(self.keep):
            raise RankPruneError(f"Energy(keep={self.keep}): keep is a share of energy, above 0 and at most 1, like 0.98")

    def rank_of(self, spectrum: Spectrum) -> int:
        return max(1, int((spectrum.errors() > 1 - self.keep + _ROUNDING).sum()))

    def relaxed(self, progress: float) -> "Energy":
        return replace(self, keep=1 - (1 - self.keep) * progress)


@dataclass(frozen=True)
class SingularValue(LocalRule):
    """As many ranks as there are singular values of at least `minimum`, in the weight's own units.

    With calibration it is in those of the layer's output: a singular value is then the root mean square of what it adds there.

    Every layer is projected to its rank, also where a pair of that rank would cost more than the layer. In training on a CPU
    values below a thousandth of a large layer's largest are rounding (see Spectrum): a smaller minimum keeps them.
    """

    minimum: float
    holds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.minimum, int | float) or not self.minimum > 0:
            raise RankPruneError(f"SingularValue(minimum={self.minimum}): give a positive threshold")

    def rank_of(self, spectrum: Spectrum) -> int:
        reached = int((spectrum.values.max(0).values >= self.minimum).sum())
        return reached + 1 if reached == spectrum.known < spectrum.full_rank else max(1, reached)


@dataclass(frozen=True)
class FixedRank(LocalRule):
    """The same rank for every layer, or its full rank where that is less."""

    rank: int

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise RankPruneError(f"FixedRank(rank={self.rank!r}): a rank is a whole number of at least 1")

    def rank_of(self, spectrum: Spectrum) -> int:
        return min(self.rank, spectrum.full_rank)


@dataclass(frozen=True)
class RankFraction(LocalRule):
    """This fraction of each layer's full rank, rounded up."""

    fraction: float

    def __post_init__(self) -> None:
        if not is_share(self.fraction):
            raise RankPruneError(f"RankFraction(fraction={self.fraction}): give a fraction above 0 and at most 1, like 0.25")

    def rank_of(self, spectrum: Spectrum) -> int:
        return max(1, math.ceil(self.fraction * spectrum.full_rank - 1e-9))
