"""The global rank rule: the ranks of all layers that together lose least within a cost for the whole network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rankprune.backends import backend_named
from rankprune.errors import RankPruneError
from rankprune.rules.base import Candidate, Choice, Cost, Metric, RankRule, is_number, is_share

_METRICS: tuple[Metric, ...] = ("macs", "params", "latency")


@dataclass(frozen=True, repr=False)
class Budget(RankRule):
    """The ranks that lose least within a cost for the whole network.

    `macs`, `params` or `latency` is the fraction of the whole dense model's cost that may remain, layers that stay dense
    included. Minimises the sum over layers of the share of its energy that each loses, plus a multiplier times the cost, with
    one multiplier for all layers (as in Idelbayev and Carreira-Perpinan, CVPR 2020), found by bisection; what the integer ranks
    leave of the budget is then spent on the steps that gain most per cost. What a layer loses counts by a power of its size.

    Latency is measured, on this machine, of the network and of each of its layers at some ranks of each scheme that `scheme`
    of TRP or make_plan names, of all with ``"auto"`` (see rankprune.latency), for inputs like the example inputs. That takes
    minutes once; the figures are kept in a file.

    Args:
        backend: what runs the network where its latency counts: ``"eager"``, ``"compile"``, ``"onnxruntime"``, ``"openvino"``,
            ``"aot_inductor"`` or ``"executorch"``.
        threads: how many it may use; None means torch.get_num_threads(). ExecuTorch has its own number and takes no other.
        size_power: the power of a layer's parameters that what it loses is weighed by: the higher, the more is left of large
            layers. Try 0.5 to train a small network that fits its training data barely; see docs/choosing.md.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    backend: str = "eager"
    threads: int | None = None
    size_power: float = 0

    def __post_init__(self) -> None:
        given = {name: value for name in _METRICS if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise RankPruneError("Budget needs exactly one of macs=, params= and latency=, like Budget(macs=0.4)")
        for name, value in given.items():
            if not is_share(value):
                raise RankPruneError(f"Budget({name}={value}): give the fraction of the dense model that may remain, in (0, 1]")
        backend_named(self.backend)
        if self.threads is not None and (not isinstance(self.threads, int) or self.threads < 1):
            raise RankPruneError(f"Budget(threads={self.threads!r}): give a whole number of at least 1, or None")
        if not is_number(self.size_power) or self.size_power < 0:
            raise RankPruneError(f"Budget(size_power={self.size_power!r}): give a number of at least 0, like 0.5")

    def __repr__(self) -> str:
        where = "" if self.latency is None else f", backend={self.backend!r}"
        threads = "" if self.threads is None else f", threads={self.threads}"
        power = f", size_power={self.size_power}" if self.size_power else ""
        return f"Budget({self.metric}={self.fraction}{where}{threads}{power})"

    @property
    def metric(self) -> Metric:  # type: ignore[override]
        """The cost the budget is in."""
        return next(name for name in _METRICS if getattr(self, name) is not None)

    @property
    def fraction(self) -> float:
        """The fraction of the dense model's cost that may remain."""
        return getattr(self, self.metric)

    def relaxed(self, progress: float) -> "Budget":
        return replace(self, **{self.metric: 1 - (1 - self.fraction) * progress})

    def choose(self, layers: Mapping[str, Sequence[Candidate]], network: Cost) -> dict[str, Choice]:
        largest = max((candidates[0].dense.params for candidates in layers.values()), default=1)
        weights = {name: (c[0].dense.params / largest) ** self.size_power for name, c in layers.items()}
        options = {name: _options(candidates, self.metric, weights[name]) for name, candidates in layers.items()}
        whole = network.of(self.metric)
        untouched = whole - sum(candidates[0].dense.of(self.metric) for candidates in layers.values())
        allowed = math.floor(self.fraction * whole + 1e-6) - untouched  # 0.29 of 100 is 29, also in binary
        least = sum(int(o.costs.min()) for o in options.values())
        if least > allowed:
            smallest = math.ceil(1e3 * (untouched + least) / whole) / 1e3
            raise RankPruneError(
                f"{self!r} cannot be met: with every layer at its least rank {smallest:.3f} of the {self.metric} remain; raise "
                "the budget, or include more layers (include=['*'] takes every layer)"
            )
        picks = _least_error(list(options.values()), allowed)
        return {name: o.choices(pick) for (name, o), pick in zip(options.items(), picks, strict=True)}


@dataclass(frozen=True)
class _Options:
    """Every allowed decision for one layer: costs and weighted errors, both (options,), "stay dense" last."""

    costs: Tensor
    errors: Tensor
    schemes: tuple[str, ...]
    ranks: tuple[int, ...]

    def choices(self, pick: int) -> Choice:
        if pick == len(self.ranks):
            return Choice(reason="it stays dense: " + ("the budget has room for it" if self.ranks else "no rank is cheaper"))
        return Choice(self.schemes[pick], self.ranks[pick])


def _options(candidates: Sequence[Candidate], metric: Metric, weight: float) -> _Options:
    dense = candidates[0].dense.of(metric)
    costs, errors, schemes, ranks = [], [], [], []
    for c in candidates:
        allowed = c.costs(metric)
        costs.append(torch.tensor(list(allowed.values()), dtype=torch.float64, device="cpu"))
        errors.append(weight * c.spectrum.errors().cpu()[list(allowed)])
        schemes += [c.scheme] * len(allowed)
        ranks += allowed
    end = torch.tensor([dense, 0.0], dtype=torch.float64, device="cpu")
    return _Options(torch.cat([*costs, end[:1]]), torch.cat([*errors, end[1:]]), tuple(schemes), tuple(ranks))


def _least_error(options: Sequence[_Options], allowed: int) -> list[int]:
    """The index of one option per layer, with the least total error at a total cost of at most `allowed`."""
    costs = nn.utils.rnn.pad_sequence([o.costs for o in options], batch_first=True, padding_value=math.inf)
    errors = nn.utils.rnn.pad_sequence([o.errors for o in options], batch_first=True, padding_value=math.inf)

    def total(picks: Tensor) -> float:
        return float(costs.gather(1, picks[:, None]).sum())

    low, high = 1e-30, 1.0  # error per unit of cost; at 1 a single unit outweighs all of a layer's energy
    picks = costs.argmin(1)
    for _ in range(40):
        middle = math.sqrt(low * high)
        trial = (errors + middle * costs).argmin(1)
        if total(trial) <= allowed:
            picks, high = trial, middle
        else:
            low = middle
    return _spent(picks, costs, errors, allowed - total(picks)).tolist()


def _spent(picks: Tensor, costs: Tensor, errors: Tensor, left: float) -> Tensor:
    """Picks that also spend what is left: the change that gains most error per cost and still fits, until none does.

    Shapes: picks (layers,), costs and errors (layers, options).
    """
    picks, best = picks.clone(), torch.zeros_like(picks)
    rates = torch.zeros(len(picks), dtype=costs.dtype, device=costs.device)

    def look(rows: Tensor) -> None:
        gain = errors[rows].gather(1, picks[rows, None]) - errors[rows]
        step = costs[rows] - costs[rows].gather(1, picks[rows, None])
        rate = torch.where((gain > 0) & (step <= left), gain / step.clamp(min=1e-9), 0.0)
        rates[rows], best[rows] = rate.max(1)

    every = torch.arange(len(picks), device=picks.device)
    look(every)
    while rates[row := rates.argmax()] > 0:
        step = float(costs[row, best[row]] - costs[row, picks[row]])
        if step <= left:  # else it did fit when this layer was looked at
            picks[row] = best[row]
            left -= step
        look(every if step < 0 else row[None])
    return picks
