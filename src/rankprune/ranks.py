"""Rank rules: all spectra of a network in, one decision per layer out.

A rule sees every layer under every scheme that may be used for it (a Candidate each), and answers with a scheme and a rank,
or with the reason why the layer stays dense. Ranks are at least 1, and a pair that is not cheaper than its layer is
never chosen.
"""

import ast
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from rankprune.errors import RankPruneError

Metric = Literal["macs", "params"]
_ROUNDING = 1e-12
"""How far off a decimal fraction may be in binary; 0.9 of ten ranks is nine."""


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates (None where no example inputs were given to count on) and parameters."""

    macs: int | None
    params: int

    def of(self, metric: Metric) -> int:
        """The figure a rule counts in.

        Raises:
            RankPruneError: for MACs that were not counted.
        """
        value = self.params if metric == "params" else self.macs
        if value is None:
            raise RankPruneError("this rule counts MACs: give example_inputs=, one batch as the model is called with")
        return value


@dataclass(frozen=True)
class Candidate:
    """One layer under one scheme.

    `values` (stack, k) are its singular values, descending; `unit` is the cost of each rank (costs are proportional to the
    rank, a bias aside); `dense` the cost of the layer as it is, bias not counted; ranks are multiples of `round_to`.
    """

    scheme: str
    values: Tensor
    unit: Cost
    dense: Cost
    round_to: int = 1

    @property
    def metric(self) -> Metric:
        """What "cheaper" means where the rule does not say: MACs if they are known."""
        return "params" if self.dense.macs is None else "macs"

    @property
    def full_rank(self) -> int:
        """The largest rank, k."""
        return self.values.shape[-1]

    def rounded(self, rank: int) -> int:
        """`rank` rounded up to a multiple of round_to, between 1 and the full rank."""
        return max(1, min(math.ceil(rank / self.round_to) * self.round_to, self.full_rank))

    def energies(self) -> Tensor:
        """The squared singular values, summed over the stack: (k,)."""
        return self.values.double().square().sum(0)

    def errors(self) -> Tensor:
        """The share of energy lost at rank 0, 1, ..., k: (k + 1,), from 1 down to 0. What is mere rounding is 0."""
        energies = self.energies()
        tail = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
        total = tail[0].clamp(min=torch.finfo(tail.dtype).tiny)
        return torch.where(tail <= _ROUNDING * total, 0.0, tail / total)


@dataclass(frozen=True)
class Choice:
    """What a rule says of one layer: a scheme and a rank, or the reason why it stays dense."""

    scheme: str | None = None
    rank: int | None = None
    reason: str | None = None


class RankRule(ABC):
    """Chooses the rank of every layer of a network."""

    metric: Metric | None = None
    """The cost that the rule needs to know; None if it needs none."""

    @abstractmethod
    def choose(self, layers: Mapping[str, Sequence[Candidate]], network: Cost) -> dict[str, Choice]:
        """One Choice for each layer.

        Args:
            layers: the candidates of each layer, one per scheme, at least one.
            network: the cost of the whole dense model, layers that stay dense included.
        """

    def relaxed(self, progress: float) -> "RankRule":
        """The rule part-way from "keep everything" (0) to itself (1), for annealing during training.

        Raises:
            RankPruneError: if the rule has no such path.
        """
        raise RankPruneError(f"{self!r} cannot be annealed; use Budget or Energy, or ramp=0")


class LocalRule(RankRule):
    """A rule that looks at one layer at a time; among schemes the cheapest wins, at the rank the rule gives each."""

    @abstractmethod
    def rank_of(self, values: Tensor) -> int:
        """The rank for singular values (stack, k), descending."""

    def choose(self, layers: Mapping[str, Sequence[Candidate]], network: Cost) -> dict[str, Choice]:
        return {name: self._choose(candidates) for name, candidates in layers.items()}

    def _choose(self, candidates: Sequence[Candidate]) -> Choice:
        ranked = [(c, c.rounded(self.rank_of(c.values))) for c in candidates]
        best, rank = min(ranked, key=lambda pair: pair[1] * pair[0].unit.of(pair[0].metric))
        metric = best.metric
        cost, dense = rank * best.unit.of(metric), best.dense.of(metric)
        if cost >= dense:
            unit = "MACs" if metric == "macs" else "parameters"
            return Choice(reason=f"{best.scheme} at rank {rank} of {best.full_rank} costs {cost} {unit}, dense {dense}")
        return Choice(best.scheme, rank)


@dataclass(frozen=True)
class Energy(LocalRule):
    """The smallest rank that keeps the share `keep` of each layer's squared singular values (TRP's energy threshold).

    >>> Energy(keep=0.9).rank_of(torch.tensor([[3.0, 1.0, 0.0]]))
    1
    """

    keep: float

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise RankPruneError(f"Energy(keep={self.keep}): keep is a share of energy, above 0 and at most 1, like 0.98")

    def rank_of(self, values: Tensor) -> int:
        energies = values.double().square().sum(0)
        tail = energies.flip(0).cumsum(0).flip(0)
        return max(1, int((tail > (1 - self.keep + _ROUNDING) * tail[0]).sum()))

    def relaxed(self, progress: float) -> "Energy":
        return Energy(1 - (1 - self.keep) * progress)


@dataclass(frozen=True)
class SingularValue(LocalRule):
    """As many ranks as there are singular values of at least `minimum`, in the weight's own units."""

    minimum: float

    def __post_init__(self) -> None:
        if not self.minimum > 0:
            raise RankPruneError(f"SingularValue(minimum={self.minimum}): give a positive threshold")

    def rank_of(self, values: Tensor) -> int:
        return max(1, int((values.max(0).values >= self.minimum).sum()))


@dataclass(frozen=True)
class FixedRank(LocalRule):
    """The same rank for every layer, or its full rank where that is less."""

    rank: int

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise RankPruneError(f"FixedRank(rank={self.rank}): a rank is a whole number of at least 1")

    def rank_of(self, values: Tensor) -> int:
        return min(self.rank, values.shape[-1])


@dataclass(frozen=True)
class RankFraction(LocalRule):
    """This fraction of each layer's full rank, rounded up."""

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise RankPruneError(f"RankFraction(fraction={self.fraction}): give a fraction above 0 and at most 1, like 0.25")

    def rank_of(self, values: Tensor) -> int:
        return max(1, math.ceil(self.fraction * values.shape[-1] - 1e-9))


@dataclass(frozen=True)
class Budget(RankRule):
    """The ranks that lose least within a cost for the whole network.

    `macs` or `params` is the fraction of the whole dense model that may remain, layers that stay dense included. Minimises the
    sum over layers of the lost share of energy, plus a multiplier times the cost, with one multiplier for all layers (as in
    Idelbayev and Carreira-Perpinan, CVPR 2020), found by bisection; what the integer ranks leave of the budget is then spent
    on the steps that gain most per cost.
    """

    macs: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in (("macs", self.macs), ("params", self.params)) if v is not None}
        if len(given) != 1:
            raise RankPruneError("Budget needs exactly one of macs= and params=, like Budget(macs=0.4)")
        for name, value in given.items():
            if not 0 < value <= 1:
                raise RankPruneError(f"Budget({name}={value}): give the fraction of the dense model that may remain, in (0, 1]")

    @property
    def metric(self) -> Metric:  # type: ignore[override]
        """The cost the budget is in."""
        return "params" if self.macs is None else "macs"

    @property
    def fraction(self) -> float:
        """The fraction of the dense model's cost that may remain."""
        return self.macs if self.macs is not None else self.params or 1.0

    def relaxed(self, progress: float) -> "Budget":
        return replace(self, **{self.metric: 1 - (1 - self.fraction) * progress})

    def choose(self, layers: Mapping[str, Sequence[Candidate]], network: Cost) -> dict[str, Choice]:
        options = {name: _options(candidates, self.metric) for name, candidates in layers.items()}
        whole = network.of(self.metric)
        untouched = whole - sum(candidates[0].dense.of(self.metric) for candidates in layers.values())
        allowed = math.floor(self.fraction * whole) - untouched
        least = sum(int(o.costs.min()) for o in options.values())
        if least > allowed:
            raise RankPruneError(
                f"{self!r} cannot be met: with every layer at its least rank {(untouched + least) / whole:.3f} of the "
                f"{self.metric} remain; raise the budget, or include more layers (include=['*'] takes every layer)"
            )
        picks = _least_error(list(options.values()), allowed)
        return {name: o.choices(pick) for (name, o), pick in zip(options.items(), picks, strict=True)}


@dataclass(frozen=True)
class _Options:
    """Every allowed decision for one layer: costs and errors, both (options,), "stay dense" last."""

    costs: Tensor
    errors: Tensor
    schemes: tuple[str, ...]
    ranks: tuple[int, ...]

    def choices(self, pick: int) -> Choice:
        if pick == len(self.ranks):
            return Choice(reason="it stays dense: the budget has room for it, or no rank is cheaper")
        return Choice(self.schemes[pick], self.ranks[pick])


def _options(candidates: Sequence[Candidate], metric: Metric) -> _Options:
    dense = candidates[0].dense.of(metric)
    costs, errors, schemes, ranks = [], [], [], []
    for c in candidates:
        affordable = min(c.full_rank, (dense - 1) // max(c.unit.of(metric), 1))
        allowed = sorted({r for r in map(c.rounded, range(1, affordable + 1)) if r <= affordable})
        costs.append(torch.tensor(allowed, dtype=torch.float64) * c.unit.of(metric))
        errors.append(c.errors().cpu()[allowed])
        schemes += [c.scheme] * len(allowed)
        ranks += allowed
    end = torch.tensor([dense, 0.0], dtype=torch.float64)
    return _Options(torch.cat([*costs, end[:1]]), torch.cat([*errors, end[1:]]), tuple(schemes), tuple(ranks))


def _least_error(options: Sequence[_Options], allowed: int) -> list[int]:
    """The index of one option per layer, with the least total error at a total cost of at most `allowed`."""
    costs = nn.utils.rnn.pad_sequence([o.costs for o in options], batch_first=True, padding_value=math.inf)
    errors = nn.utils.rnn.pad_sequence([o.errors for o in options], batch_first=True, padding_value=math.inf)

    def total(picks: Tensor) -> float:
        return float(costs.gather(1, picks[:, None]).sum())

    low, high = 1e-30, 1.0  # error per unit of cost; at 1 a single unit outweighs all of a layer's energy
    picks = costs.argmin(1)
    for _ in range(60):
        middle = math.sqrt(low * high)
        trial = (errors + middle * costs).argmin(1)
        if total(trial) <= allowed:
            picks, high = trial, middle
        else:
            low = middle
    while True:  # spend what is left: the change that gains most error per cost and still fits, until none does
        gain = errors.gather(1, picks[:, None]) - errors
        step = costs - costs.gather(1, picks[:, None])
        rate = torch.where((gain > 0) & (step <= allowed - total(picks)), gain / step.clamp(min=1e-9), 0.0)
        best = int(rate.argmax())
        if rate.view(-1)[best] <= 0:
            return picks.tolist()
        picks[best // rate.shape[1]] = best % rate.shape[1]


RULES: Mapping[str, type[RankRule]] = MappingProxyType(
    {rule.__name__: rule for rule in (Energy, SingularValue, FixedRank, RankFraction, Budget)}
)


def parse_rule(text: str) -> RankRule:
    """A rule from its text, as in Python: ``"Budget(macs=1/2.2)"``, ``"Energy(keep=0.98)"``; values may be fractions.

    Raises:
        RankPruneError: for anything else.
    """
    wrong = RankPruneError(f"cannot read the rule {text!r}; write it like Budget(macs=0.4) or Energy(keep=0.98)")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise wrong from error
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.func.id not in RULES or tree.args:
        raise wrong
    try:
        return RULES[tree.func.id](**{k.arg or "": _number(k.value) for k in tree.keywords})
    except (TypeError, SyntaxError, ZeroDivisionError) as error:
        raise wrong from error


def _number(node: ast.expr) -> float | int | None:
    """A constant, or the quotient of two."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return (_number(node.left) or 0) / (_number(node.right) or 0)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -(_number(node.operand) or 0)
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, int | float)):
        return node.value
    raise SyntaxError("not a number")
