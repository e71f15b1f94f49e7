"""Latency as a cost: what each layer takes, dense and as a pair of each scheme and rank, on the user's runtime and machine.

Layers are timed by themselves, with the BatchNorm and activation behind them that runtimes fuse, all candidates of a layer in
turn within one loop. What this says of the whole network is corrected by decomposed networks, timed beside the dense one.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rankprune.cost import Inputs
from rankprune.latency.cache import NOISY
from rankprune.latency.followers import followers
from rankprune.latency.meter import LayerTimes, Meter, Setting, Subject, Variant


class NoisyMeasurementWarning(UserWarning):
    """Times on this machine vary too much to choose ranks by."""


@dataclass(frozen=True)
class LatencyTable:
    """Nanoseconds of a network and of its layers.

    With some layers replaced, the network takes as much less as the sum of their differences. `share` is how much of what
    layers save by themselves arrives in the network; it is in the layers' times already.
    """

    setting: Setting
    network_ns: int
    layers: Mapping[str, LayerTimes]
    share: float

    def saved_ns(self, variant: Variant) -> int:
        """What the network takes less with these pairs."""
        layers = self.layers
        return sum(layers[name].dense_ns - layers[name].pair_ns[scheme][rank] for name, (scheme, rank) in variant.items())

    def with_share(self, share: float) -> "LatencyTable":
        """The same measurements under another share."""
        layers = {name: times.scaled(share / self.share) for name, times in self.layers.items()}
        return replace(self, layers=layers, share=share)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "LatencyTable":
        """The inverse of dataclasses.asdict."""
        layers = {name: LayerTimes(**times) for name, times in values["layers"].items()}
        return cls(Setting(**values["setting"]), values["network_ns"], layers, values["share"])


def ranks_to_try(largest: int, count: int, multiple: int = 1) -> list[int]:
    """About `count` ranks up to `largest`, all multiples of `multiple`.

    They are multiples of a power of two, which take less time than their neighbours in all that we measured, and below the
    first its halves, to 8.
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
    with Meter.metering(model, backend, threads) as meter:
        tails = followers(model, x, {name: s.module for name, s in subjects.items()})
        layers = {name: meter.layer(subject, tails[name]) for name, subject in subjects.items()}
        table = LatencyTable(meter.setting, 0, layers, 1.0)
        return _corrected(table, meter, model, x, subjects, [_near(layers, part) for part in (0.5, 0.25)])


def correct_table(
    table: LatencyTable, model: nn.Module, x: Inputs, subjects: Mapping[str, Subject], variant: Variant
) -> LatencyTable:
    """The table with the share that is right for `variant`, timed beside the dense network. Raises what measure_table does."""
    with Meter.metering(model, table.setting.backend, table.setting.threads) as meter:
        return _corrected(table, meter, model, x, subjects, [variant])


def _corrected(
    table: LatencyTable,
    meter: Meter,
    model: nn.Module,
    x: Inputs,
    subjects: Mapping[str, Subject],
    variants: Sequence[Variant],
) -> LatencyTable:
    found = meter.network(model, x, subjects, variants)
    noisy = [spread for spread in meter.spreads if spread > NOISY]
    if noisy:
        warnings.warn(
            f"{len(noisy)} of {len(meter.spreads)} measurements on this machine vary by more than {NOISY:.0%}, the worst by "
            f"{max(noisy):.0%}, too much to choose ranks by; stop what else runs on it and try again, or budget in MACs, like "
            "Budget(macs=0.5)",
            NoisyMeasurementWarning,
            stacklevel=2,
        )
    expected = [table.saved_ns(variant) / table.share / 1e6 for variant in variants]
    weight = sum(saving**2 for saving in expected)  # least squares of: arrived = share * expected
    arrived = [found["dense"] - ms for ms in found["decomposed"]]
    share = sum(a * b for a, b in zip(expected, arrived, strict=True)) / weight if weight else table.share
    return replace(table.with_share(max(share, 0.05)), network_ns=round(found["dense"] * 1e6))


def measure_layer(
    model: nn.Module, x: Inputs, name: str, subject: Subject, backend: str, threads: int | None = None
) -> LayerTimes:
    """Time one layer of a model by itself. Raises what measure_table does."""
    with Meter.metering(model, backend, threads) as meter:
        return meter.layer(subject, followers(model, x, {name: subject.module})[name])


def _near(layers: Mapping[str, LayerTimes], part: float) -> Variant:
    """For each layer that a pair makes faster, the scheme and rank whose time is closest to this part of the dense one."""
    found = {}
    for name, times in layers.items():
        options = [(s, rank, ns) for s, ranks in times.pair_ns.items() for rank, ns in ranks.items() if ns < times.dense_ns]
        if options:
            scheme, rank, _ = min(options, key=lambda option: abs(option[2] - part * times.dense_ns))
            found[name] = (scheme, rank)
    return found
