"""Latency as a cost: what each layer takes, dense and as a pair of each scheme and rank, on the user's runtime and machine.

Layers are timed by themselves, with the BatchNorm and activation behind them that runtimes fuse, all candidates of a layer in
turn within one loop. What this says of the whole network is corrected by two decomposed networks, timed beside the dense one.
"""

import copy
import hashlib
import logging
import math
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from rankprune.backends import backend_named
from rankprune.backends.base import tensors
from rankprune.backends.timing import spread, time_together
from rankprune.cost import Inputs, call, cpu_name, undisturbed
from rankprune.latency_cache import NOISY, LatencyCache
from rankprune.schemes import Scheme

logger = logging.getLogger(__name__)

_TRIES = 3
_FUSED = (BatchNorm, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid)


class NoisyMeasurementWarning(UserWarning):
    """Times on this machine vary too much to choose ranks by."""


@dataclass(frozen=True)
class Setting:
    """Where and how latencies are measured."""

    backend: str
    version: str
    threads: int
    dtype: str
    memory_format: str
    device: str
    cpu: str

    @classmethod
    def of(cls, model: nn.Module, backend: str, threads: int | None) -> "Setting":
        """That of a model on this machine."""
        first = next(model.parameters())
        return cls(
            backend=backend,
            version=backend_named(backend).version,
            threads=threads or torch.get_num_threads(),
            dtype=str(first.dtype).removeprefix("torch."),
            memory_format="channels_last" if any(map(_is_channels_last, model.parameters())) else "contiguous",
            device=first.device.type,
            cpu=cpu_name() if first.device.type == "cpu" else torch.cuda.get_device_name(first.device),
        )


@dataclass(frozen=True)
class LayerTimes:
    """Nanoseconds that one layer adds to a forward pass of the network: dense, and as a pair, by scheme and rank."""

    dense_ns: int
    pair_ns: Mapping[str, Mapping[int, int]]


@dataclass(frozen=True)
class LatencyTable:
    """Nanoseconds of a network and of its layers. With some layers replaced it takes the sum of the differences less."""

    setting: Setting
    network_ns: int
    layers: Mapping[str, LayerTimes]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "LatencyTable":
        """The inverse of dataclasses.asdict."""
        layers = {name: LayerTimes(**times) for name, times in values["layers"].items()}
        return cls(Setting(**values["setting"]), values["network_ns"], layers)


@dataclass(frozen=True)
class Subject:
    """A layer to be timed: the shapes of its input in each call, and the ranks to try of each scheme."""

    module: nn.Module
    input_shapes: tuple[tuple[int, ...], ...]
    ranks: Mapping[Scheme[Any], Sequence[int]]

    def pair(self, scheme: str, rank: int) -> nn.Module:
        """A pair of random weights."""
        return _filled(next(s for s in self.ranks if s.name == scheme).pair_like(self.module, rank))


def ranks_to_try(largest: int, count: int) -> list[int]:
    """About `count` multiples of a power of two, up to `largest`: kernels work on so many channels at once."""
    step = 2 ** max(0, round(math.log2(max(largest, 1) / count)))
    return list(range(step, largest + 1, step))


def measure_table(
    model: nn.Module, x: Inputs, subjects: Mapping[str, Subject], backend: str, threads: int | None = None
) -> LatencyTable:
    """Time the network and its layers, or read from the cache what was timed on this machine before.

    Raises:
        RankPruneError: for an unknown backend.
        MissingExtraError: if the backend is not installed.
        ExportError: if the backend cannot take the model or a layer.

    Warns:
        NoisyMeasurementWarning: if the network's times vary by more than a fifth in each of three tries.
    """
    backend_named(backend).require()
    meter = _Meter(Setting.of(model, backend, threads))
    tails = followers(model, x, {name: s.module for name, s in subjects.items()})
    times = {name: meter.layer(subject, tails[name]) for name, subject in subjects.items()}
    network = meter.network(model, x, subjects, times)
    if network["spread"] > NOISY:
        warnings.warn(
            f"times on this machine vary by {network['spread']:.0%}, too much to choose ranks by; stop what else runs on "
            "it and try again, or budget in MACs, like Budget(macs=0.5)",
            NoisyMeasurementWarning,
            stacklevel=2,
        )

    layers = {name: _layer_times(t, network["share"]) for name, t in times.items()}
    return LatencyTable(meter.setting, round(network["dense"] * 1e6), layers)


def measure_layer(
    model: nn.Module, x: Inputs, name: str, subject: Subject, backend: str, threads: int | None = None
) -> LayerTimes:
    """Time one layer of a model by itself. Raises what measure_table does."""
    backend_named(backend).require()
    meter = _Meter(Setting.of(model, backend, threads))
    return _layer_times(meter.layer(subject, followers(model, x, {name: subject.module})[name]), 1.0)


def _layer_times(times: Mapping[str, Any], share: float) -> LayerTimes:
    def ns(milliseconds: float) -> int:
        return round(milliseconds * share * 1e6)

    pairs = {scheme: {int(rank): ns(ms) for rank, ms in ranks.items()} for scheme, ranks in times["pairs"].items()}
    return LayerTimes(ns(times["dense"]), pairs)


class _Meter:
    """Measures in one setting, in milliseconds, what its cache does not know."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.cache = LatencyCache(asdict(setting))
        self._backend = backend_named(setting.backend)

    def layer(self, subject: Subject, tail: Sequence[nn.Module]) -> dict[str, Any]:
        """A layer with `tail` behind, over all its calls: {"dense": ms, "pairs": {scheme: {rank: ms}}}."""
        text = f"{subject.module} {[str(m) for m in tail]} { {s.name: list(ranks) for s, ranks in subject.ranks.items()} }"
        calls = [
            self.cache.get(f"{text} on {shape}", lambda shape=shape: self._time_layer(subject, shape, tail))
            for shape in subject.input_shapes
        ]
        pairs = {s: {r: sum(c["pairs"][s][r] for c in calls) for r in ranks} for s, ranks in calls[0]["pairs"].items()}
        return {"dense": sum(c["dense"] for c in calls), "pairs": pairs}

    def _time_layer(self, subject: Subject, shape: tuple[int, ...], tail: Sequence[nn.Module]) -> dict[str, Any]:
        began = time.perf_counter()
        weight = subject.module.get_parameter("weight")
        x = torch.randn(shape, device=weight.device).to(weight.dtype)
        if _is_channels_last(weight):
            x = x.contiguous(memory_format=torch.channels_last)
        pairs = {(s.name, rank): subject.pair(s.name, rank) for s, ranks in subject.ranks.items() for rank in ranks}
        distinct = {"": copy.deepcopy(subject.module)} | {str(pair): pair for pair in pairs.values()}
        ms, noise = self._time([nn.Sequential(module, *tail).eval() for module in distinct.values()], x)
        found = dict(zip(distinct, ms, strict=True))
        by_scheme: dict[str, dict[str, float]] = {s.name: {} for s in subject.ranks}
        for (scheme, rank), pair in pairs.items():
            by_scheme[scheme][str(rank)] = found[str(pair)]
        logger.info("%s: %d variants of %s in %.0f s", self._backend.name, len(ms), subject.module, time.perf_counter() - began)
        return {"dense": found[""], "pairs": by_scheme, "spread": noise}

    def network(
        self, model: nn.Module, x: Inputs, subjects: Mapping[str, Subject], times: Mapping[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """The dense network, and the share of what layers save by themselves that arrives in it.

        Two decomposed networks tell: one whose layers take about half their time, one whose layers take about a quarter.
        """
        variants = [_near(times, part) for part in (0.5, 0.25)]
        shapes = [tuple(t.shape) for t in tensors(x)]
        digest = hashlib.sha256(f"{model} {variants}".encode()).hexdigest()[:16]
        return self.cache.get(
            f"{type(model).__name__} {digest} on {shapes}", lambda: self._time_network(model, x, subjects, times, variants)
        )

    def _time_network(
        self,
        model: nn.Module,
        x: Inputs,
        subjects: Mapping[str, Subject],
        times: Mapping[str, dict[str, Any]],
        variants: Sequence[Mapping[str, tuple[str, int]]],
    ) -> dict[str, Any]:
        with undisturbed(model):
            networks = [model, *(_with_pairs(model, subjects, variant) for variant in variants)]
            (dense, *small), noise = self._time(networks, x)
        expected = [
            sum(times[name]["dense"] - times[name]["pairs"][scheme][str(rank)] for name, (scheme, rank) in variant.items())
            for variant in variants
        ]
        weight = sum(saving**2 for saving in expected)  # least squares of: arrived = share * expected
        share = sum(saving * (dense - ms) for saving, ms in zip(expected, small, strict=True)) / weight if weight else 1.0
        return {"dense": dense, "decomposed": small, "share": max(share, 0.05), "spread": noise}

    def _time(self, models: Sequence[nn.Module], x: Inputs) -> tuple[list[float], float]:
        """The models' medians, and the spread of the first one's times; of several tries the calmest."""
        programs = self._backend.load_each(models, x, self.setting.threads)
        best: tuple[list[float], float] | None = None
        for _ in range(_TRIES):
            found = time_together(programs, x)
            noise = spread(found[0])
            if best is None or noise < best[1]:
                best = [statistics.median(values) for values in found], noise
            if noise <= NOISY / 2:
                break
        assert best is not None
        return best


def _near(times: Mapping[str, dict[str, Any]], part: float) -> dict[str, tuple[str, int]]:
    """For each layer that a pair makes faster, the scheme and rank whose time is closest to this part of the dense one."""
    found = {}
    for name, t in times.items():
        faster = [(s, int(r), ms) for s, ranks in t["pairs"].items() for r, ms in ranks.items() if ms < t["dense"]]
        if faster:
            scheme, rank, _ = min(faster, key=lambda option: abs(option[2] - part * t["dense"]))
            found[name] = (scheme, rank)
    return found


def _with_pairs(model: nn.Module, subjects: Mapping[str, Subject], variant: Mapping[str, tuple[str, int]]) -> nn.Module:
    """A copy of the model with pairs of random weights."""
    root = nn.ModuleDict({"model": copy.deepcopy(model)})  # for a model that is a layer itself
    for name, (scheme, rank) in variant.items():
        root.set_submodule(f"model.{name}".removesuffix("."), subjects[name].pair(scheme, rank))
    return root["model"].eval()


@torch.no_grad()
def _filled(module: nn.Module) -> nn.Module:
    """The module with weights that keep outputs of ordinary size: what is no number, or tiny, takes another time."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=1 / math.sqrt(max(1, parameter[0].numel())))
    return module


def followers(model: nn.Module, x: Inputs, layers: Mapping[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """Copies of the BatchNorm and activation modules that take up each layer's output as it is, in order."""
    tails: dict[str, list[nn.Module]] = {name: [] for name in layers}
    made_by: dict[int, str] = {}
    outputs: list[Tensor] = []  # kept, or another tensor could get the same id
    handles = []

    def made(output: Any, name: str) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)
            made_by[id(output)] = name

    def follow(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = made_by.pop(id(args[0]), None) if args else None
        if name is not None:
            if module not in tails[name]:
                tails[name].append(module)
            made(output, name)

    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(lambda m, args, output, name=name: made(output, name)))
    handles += [m.register_forward_hook(follow) for m in model.modules() if isinstance(m, _FUSED)]
    try:
        with undisturbed(model):
            call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: [copy.deepcopy(m) for m in tail] for name, tail in tails.items()}


def _is_channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
