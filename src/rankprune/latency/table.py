"""Latency as a cost: what each layer takes, dense and as a pair of each scheme and rank, on the user's runtime and machine.

Layers are timed by themselves, with the BatchNorm and activation behind them that runtimes fuse, all candidates of a layer in
turn within one loop. What this says of the whole network is corrected by decomposed networks, timed beside the dense one.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from rankprune.errors import ExportError
from rankprune.inputs import Inputs, cloned, shapes
from rankprune.latency.cache import NOISY
from rankprune.latency.followers import followers
from rankprune.latency.meter import LayerTimes, Meter, Setting, Subject, Variant

_LEAST_SHARE = 0.05
_NEWEST = 100.0
"""How much more than another the last trial weighs: it is nearest to what the rule will choose."""


class NoisyMeasurementWarning(UserWarning):
    """Times on this machine vary too much to choose ranks by."""


@dataclass(frozen=True)
class Trial:
    """Nanoseconds of a network with some layers replaced, timed beside the dense one."""

    variant: Variant
    dense_ns: int
    ns: int


@dataclass(frozen=True)
class LatencyTable:
    """Times of a network, and of its layers by themselves.

    The dense network takes `network_ns`. With some layers replaced it saves `share` of what these save by themselves, less
    `overhead_ns` for each. Both are fitted to `trials`, of which the last one weighs most.
    """

    setting: Setting
    input_shapes: tuple[tuple[int, ...], ...]
    alone: Mapping[str, LayerTimes]
    trials: tuple[Trial, ...] = ()
    share: float = 1.0
    overhead_ns: float = 0.0
    network_ns: int = 0

    @cached_property
    def layers(self) -> dict[str, LayerTimes]:
        """What each layer adds to the network's time."""
        return {name: times.scaled(self.share, self.overhead_ns) for name, times in self.alone.items()}

    def measured_ns(self, variant: Variant) -> int | None:
        """What the network takes with these layers replaced, if that was timed."""
        found = next((trial for trial in reversed(self.trials) if trial.variant == variant), None)
        return None if found is None else round(found.ns / found.dense_ns * self.network_ns)

    def after(self, trials: Sequence[Trial]) -> "LatencyTable":
        """The table with these trials as well, fitted to all."""
        trials = (*self.trials, *trials)
        dense = trials[-1].dense_ns
        alone = [self._saved_alone(trial.variant) for trial in trials]
        arrived = [dense * (1 - trial.ns / trial.dense_ns) for trial in trials]
        share, overhead = _fit(alone, [len(trial.variant) for trial in trials], arrived)
        return replace(self, trials=trials, share=share, overhead_ns=overhead, network_ns=dense)

    def _saved_alone(self, variant: Variant) -> int:
        """What these layers save by themselves."""
        pairs = ((self.alone[name], scheme, rank) for name, (scheme, rank) in variant.items())
        return sum(times.dense_ns - times.pair_ns[scheme][rank] for times, scheme, rank in pairs)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "LatencyTable":
        """The inverse of dataclasses.asdict, also after JSON."""
        return cls(
            Setting(**values["setting"]),
            tuple(map(tuple, values["input_shapes"])),
            {name: LayerTimes.of(times) for name, times in values["alone"].items()},
            tuple(
                Trial({name: (scheme, rank) for name, (scheme, rank) in t["variant"].items()}, t["dense_ns"], t["ns"])
                for t in values["trials"]
            ),
            values["share"],
            values["overhead_ns"],
            values["network_ns"],
        )


def ranks_to_try(largest: int, count: int, multiple: int = 1) -> list[int]:
    """About `count` ranks up to `largest`, all multiples of `multiple`.

    They are multiples of a power of two, and below the first its halves, to 8: spatial pairs in ONNX Runtime take less time at
    multiples of 16 than at their neighbours; elsewhere it is a grid like another.
    """
    step = math.lcm(multiple, 2 ** max(0, round(math.log2(max(largest, 1) / count))))
    low = [rank for rank in (step // 8, step // 4, step // 2) if rank >= 8 and rank % multiple == 0]
    return [rank for rank in (*low, *range(step, largest + 1, step)) if rank <= largest]


def measure_table(
    model: nn.Module, x: Inputs, subjects: Mapping[str, Subject], backend: str, threads: int | None = None
) -> LatencyTable:
    """Time the network and its layers, or read from the cache what was timed on this machine before.

    Raises:
        RankPruneError: for an unknown backend, or threads where the backend does not take them.
        MissingExtraError: if the backend is not installed.
        ExportError: if the backend cannot take the model or a layer.

    Warns:
        NoisyMeasurementWarning: if the times of a layer or the network vary by more than a fifth in each of three tries.
    """
    x = cloned(x)
    with Meter.metering(model, backend, threads) as meter:
        meter.check(model, x)  # or its layers need not be timed
        tails = followers(model, x, {name: s.module for name, s in subjects.items()})
        alone = {name: _layer(meter, name, subject, tails[name]) for name, subject in subjects.items()}
        table = LatencyTable(meter.setting, shapes(x), alone)
        return table.after(_trials(meter, table, model, x, subjects, _first_variants(alone))[0])


def correct_table(
    table: LatencyTable, model: nn.Module, x: Inputs, subjects: Mapping[str, Subject], variant: Variant, *, fit: bool = True
) -> LatencyTable:
    """The table after a trial of `variant`; without `fit` that is only noted. Raises and warns as measure_table does.

    Where the dense network takes longer than before, by more than a fifth, the trial says nothing and the table stays.
    """
    with Meter.metering(model, table.setting.backend, table.setting.threads) as meter:
        trials, busy = _trials(meter, table, model, cloned(x), subjects, [variant])
    if busy:
        return table
    return table.after(trials) if fit else replace(table, trials=(*table.trials, *trials))


def _trials(
    meter: Meter, table: LatencyTable, model: nn.Module, x: Inputs, subjects: Mapping[str, Subject], variants: Sequence[Variant]
) -> tuple[list[Trial], bool]:
    (dense, *decomposed), busy = meter.network(model, x, subjects, variants, table.network_ns or None)
    _warn_if_noisy(meter)
    return [Trial(variant, dense, ns) for variant, ns in zip(variants, decomposed, strict=True)], busy


def _warn_if_noisy(meter: Meter) -> None:
    noisy = [spread for spread in meter.spreads if spread > NOISY]
    if noisy:
        warnings.warn(
            f"{len(noisy)} of {len(meter.spreads)} measurements on this machine vary by more than {NOISY:.0%}, or are as far "
            f"above earlier ones, the worst by {max(noisy):.0%}: too much to go by; stop what else runs on it and "
            "try again, or budget in MACs, like Budget(macs=0.5)",
            NoisyMeasurementWarning,
            stacklevel=3,
        )


def _layer(meter: Meter, name: str, subject: Subject, tail: Sequence[nn.Module]) -> LayerTimes:
    try:
        return meter.layer(subject, tail)
    except ExportError as error:
        error.args = (f"layer {name!r}, {subject.module}, by itself or as a pair: {error}",)
        raise


def measure_layer(
    model: nn.Module, x: Inputs, name: str, subject: Subject, backend: str, threads: int | None = None
) -> LayerTimes:
    """Time one layer of a model by itself. Raises and warns as measure_table does."""
    with Meter.metering(model, backend, threads) as meter:
        times = _layer(meter, name, subject, followers(model, cloned(x), {name: subject.module})[name])
        _warn_if_noisy(meter)
        return times


def _first_variants(alone: Mapping[str, LayerTimes]) -> list[Variant]:
    """All layers that a pair makes faster at a quarter of their time and at half, and those that then save most at half."""
    quarter, half = (_near(alone, part) for part in (0.25, 0.5))
    saved = {name: alone[name].dense_ns - alone[name].pair_ns[scheme][rank] for name, (scheme, rank) in half.items()}
    most = sorted(saved, key=saved.__getitem__, reverse=True)[: -(-len(saved) // 2)]
    return [quarter, {name: half[name] for name in half if name in most}, half]


def _near(layers: Mapping[str, LayerTimes], part: float) -> Variant:
    """For each layer that a pair makes faster, the scheme and rank whose time is closest to this part of the dense one."""
    found = {}
    for name, times in layers.items():
        options = [(s, rank, ns) for s, ranks in times.pair_ns.items() for rank, ns in ranks.items() if ns < times.dense_ns]
        if options:
            scheme, rank, _ = min(options, key=lambda option: abs(option[2] - part * times.dense_ns))
            found[name] = (scheme, rank)
    return found


def _fit(alone: Sequence[float], replaced: Sequence[float], arrived: Sequence[float]) -> tuple[float, float]:
    """The share and overhead, by least squares of arrived = share * alone - overhead * replaced.

    The share is at least 0.05, the overhead at least 0, and just that where trials do not tell the two apart.
    """
    weights = [1.0] * (len(arrived) - 1) + [_NEWEST]

    def product(x: Sequence[float], y: Sequence[float]) -> float:
        return sum(map(math.prod, zip(weights, x, y, strict=True)))

    square, cross, other = product(alone, alone), product(alone, replaced), product(replaced, replaced) * (1 + 1e-6)
    with_alone, with_replaced = product(alone, arrived), product(replaced, arrived)
    determinant = square * other - cross**2
    if not determinant:  # nothing was replaced
        return 1.0, 0.0
    share = (with_alone * other - cross * with_replaced) / determinant
    overhead = (with_alone * cross - square * with_replaced) / determinant
    if share < _LEAST_SHARE:
        share, overhead = _LEAST_SHARE, (_LEAST_SHARE * cross - with_replaced) / other
    if overhead < 0:
        share, overhead = max(_LEAST_SHARE, with_alone / square), 0.0
    return share, overhead
