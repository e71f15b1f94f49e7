"""Measuring networks and single layers in one setting."""

import copy
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from rankprune.backends import backend_named
from rankprune.errors import RankPruneError
from rankprune.inputs import Inputs
from rankprune.latency.cache import NOISY, LatencyCache
from rankprune.latency.signature import described, numerics_on
from rankprune.machine import device_name, usable_cores
from rankprune.passes import undisturbed
from rankprune.replacement import with_pairs
from rankprune.schemes import Scheme
from rankprune.schemes.base import CHANNELS_LAST, Convolution, is_channels_last
from rankprune.timing import spread, time_together
from rankprune.wrappers import named_modules

logger = logging.getLogger(__name__)

Variant = Mapping[str, tuple[str, int]]
"""The layers of a network that become pairs, with the scheme and rank of each."""


_TRIES = 3


@dataclass(frozen=True)
class Setting:
    """Where and how latencies are measured.

    `cpu` is the name of the processor that computes, a GPU's where it is one; `cores` how many of the machine's may be used;
    `version` the backend's; `torch` that of the PyTorch which exported for it.
    """

    backend: str
    version: str
    threads: int
    dtype: str
    memory_format: str
    device: str
    cpu: str
    cores: int = 0
    torch: str = ""

    @classmethod
    def of(cls, model: nn.Module, backend: str, threads: int | None = None) -> "Setting":
        """That of a model on this machine; without `threads`, on as many as the backend would use now."""
        runtime, first = backend_named(backend), next(model.parameters())
        device = torch.device("cpu") if runtime.cpu_only else first.device
        return cls(
            backend=backend,
            version=runtime.version,
            threads=threads or runtime.threads,
            dtype=str(first.dtype).removeprefix("torch."),
            memory_format="channels_last" if any(map(is_channels_last, model.parameters())) else "contiguous",
            device=device.type,
            cpu=device_name(device),
            cores=usable_cores(),
            torch=str(torch.__version__),  # a text that checkpoints can hold
        )


@dataclass(frozen=True)
class LayerTimes:
    """Nanoseconds that one layer adds to a forward pass of the network: dense, and as a pair, by scheme and rank."""

    dense_ns: int
    pair_ns: Mapping[str, Mapping[int, int]]

    def scaled(self, factor: float, overhead_ns: float = 0.0) -> "LayerTimes":
        """Times that are this many times as long, and pairs' longer by an overhead."""
        pairs = {s: {rank: round(ns * factor + overhead_ns) for rank, ns in ranks.items()} for s, ranks in self.pair_ns.items()}
        return LayerTimes(round(self.dense_ns * factor), pairs)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "LayerTimes":
        """The inverse of dataclasses.asdict, also after JSON, which makes ranks text."""
        pairs = {scheme: {int(rank): ns for rank, ns in ranks.items()} for scheme, ranks in values["pair_ns"].items()}
        return cls(values["dense_ns"], pairs)


@dataclass(frozen=True)
class Subject:
    """A layer to be timed: the shapes of its input in each call, and the ranks to try of each scheme."""

    module: nn.Module
    input_shapes: tuple[tuple[int, ...], ...]
    ranks: Mapping[Scheme[Any], Sequence[int]]

    def pair(self, scheme: str, rank: int) -> nn.Module:
        """A pair of random weights."""
        return _filled(next(s for s in self.ranks if s.name == scheme).pair_like(self.module, rank))


class Meter:
    """Measures in one setting what its cache, in milliseconds, does not know. Use `metering`, which makes the setting true."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.cache = LatencyCache(asdict(setting))
        self.spreads: list[float] = []
        self._backend = backend_named(setting.backend)

    @classmethod
    @contextmanager
    def metering(cls, model: nn.Module, backend: str, threads: int | None) -> Iterator["Meter"]:
        """A meter for a model on this machine, which is left as it was, and the random number generators too."""
        with undisturbed(model), backend_named(backend).on_threads(threads):
            yield cls(Setting.of(model, backend))

    def layer(self, subject: Subject, tail: Sequence[nn.Module]) -> LayerTimes:
        """A layer with `tail` behind, over all its calls."""
        kind = str(subject.module.get_parameter("weight").dtype).removeprefix("torch.")
        ranks = {s.name: list(ranks) for s, ranks in subject.ranks.items()}
        numerics = numerics_on(subject.module.get_parameter("weight").device.type)
        text = f"{subject.module} {kind} {[str(m) for m in tail]} {ranks} {numerics}"
        calls = [
            self._known(f"{text} on {shape}", lambda shape=shape: self._time_layer(subject, shape, tail))
            for shape in subject.input_shapes
        ]
        pairs = {s: {int(r): sum(c["pairs"][s][r] for c in calls) for r in ms} for s, ms in calls[0]["pairs"].items()}
        return LayerTimes(sum(c["dense"] for c in calls), pairs).scaled(1e6)

    def _time_layer(self, subject: Subject, shape: tuple[int, ...], tail: Sequence[nn.Module]) -> dict[str, Any]:
        began = time.perf_counter()
        weight = subject.module.get_parameter("weight")
        x = torch.randn(shape, device=weight.device).to(weight.dtype)
        order = CHANNELS_LAST.get(x.dim()) if isinstance(subject.module, Convolution) else None
        if order is not None and self.setting.memory_format == "channels_last":
            x = x.contiguous(memory_format=order)
        pairs = {(s.name, rank): subject.pair(s.name, rank) for s, ranks in subject.ranks.items() for rank in ranks}
        distinct = {"": copy.deepcopy(subject.module)} | {str(pair): pair for pair in pairs.values()}
        ms, noise = self._time([nn.Sequential(module, *tail).eval() for module in distinct.values()], x)
        found = dict(zip(distinct, ms, strict=True))
        by_scheme: dict[str, dict[str, float]] = {s.name: {} for s in subject.ranks}
        for (scheme, rank), pair in pairs.items():
            by_scheme[scheme][str(rank)] = found[str(pair)]
        logger.info("%s: %d variants of %s in %.0f s", self._backend.name, len(ms), subject.module, time.perf_counter() - began)
        return {"dense": found[""], "pairs": by_scheme, "spread": noise}

    def check(self, model: nn.Module, x: Inputs) -> None:
        """Make sure that the backend can take the network.

        Raises:
            RankPruneError: what its load() does; if there is too little memory.
        """

        def load() -> dict[str, Any]:
            self._backend.load(model, x)
            return {"spread": 0.0}

        self._found(f"{described(model, x)} can be taken", load)

    def network(
        self, model: nn.Module, x: Inputs, subjects: Mapping[str, Subject], variants: Sequence[Variant], dense_ns: int | None
    ) -> tuple[list[int], bool]:
        """Nanoseconds of the dense network and of its variants; and whether the machine did something else as well.

        That is where the dense one takes longer than `dense_ns`, as before, by more than a fifth; it counts as noise.
        """

        place = self._backend.placed_model

        def measure() -> dict[str, Any]:
            networks = [place(model)]  # before the copies: they are not made on a GPU for a runtime of the CPU
            modules = named_modules(networks[0])
            for variant in variants:
                pairs = {name: place(subjects[name].pair(scheme, rank)) for name, (scheme, rank) in variant.items()}
                networks.append(with_pairs(networks[0], {name: modules[name] for name in variant}, pairs))
                networks[-1].eval()  # not as a value: some train() return nothing
            ms, noise = self._time(networks, x, None if dense_ns is None else dense_ns / 1e6)
            return {"ms": ms, "spread": noise, "busy": dense_ns is not None and 1e6 * ms[0] > (1 + NOISY) * dense_ns}

        found = self._known(described(model, x, [dict(v) for v in variants]), measure)
        return [round(ms * 1e6) for ms in found["ms"]], found["busy"]

    def _known(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        found = self._found(key, measure)
        self.spreads.append(found["spread"])
        return found

    def _found(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return self.cache.get(key, measure)
        except torch.OutOfMemoryError as error:  # a training's own weights and states may leave too little
            raise RankPruneError(f"there is too little memory to time layers and networks here ({error})") from error

    def _time(self, models: Sequence[nn.Module], x: Inputs, first_ms: float | None = None) -> tuple[list[float], float]:
        """The models' medians, and the median of their spreads, or how far the first is above `first_ms` if that is more.

        Of several tries it is the calmest.
        """
        programs, x = self._backend.load_each(models, x), self._backend.placed(x)
        best: tuple[list[float], float] | None = None
        for _ in range(_TRIES):
            found = time_together(programs, x)
            ms, noise = [statistics.median(values) for values in found], statistics.median(map(spread, found))
            drift = 0.0 if first_ms is None else max(0.0, ms[0] / first_ms - 1)
            if best is None or max(noise, drift) < best[1]:
                best = ms, max(noise, drift)
            if noise <= NOISY / 2 and drift <= NOISY:
                break
        assert best is not None
        return best


@torch.no_grad()
def _filled(module: nn.Module) -> nn.Module:
    """The module with weights that keep outputs of ordinary size: what is no number, or tiny, takes another time."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=1 / math.sqrt(max(1, parameter[0].numel())))
    return module
