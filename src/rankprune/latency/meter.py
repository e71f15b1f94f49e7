"""Measuring networks and single layers in one setting."""

import copy
import hashlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from rankprune.backends import backend_named
from rankprune.backends.base import shapes, tensors
from rankprune.cost import Inputs, count, cpu_name, undisturbed, usable_cores
from rankprune.latency.cache import NOISY, LatencyCache
from rankprune.precision import float32_products
from rankprune.replacement import with_pairs
from rankprune.schemes import Scheme
from rankprune.schemes.base import is_channels_last
from rankprune.timing import spread, time_together

logger = logging.getLogger(__name__)

Variant = Mapping[str, tuple[str, int]]
"""The layers of a network that become pairs, with the scheme and rank of each."""


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
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
            cpu=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
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
        numerics = _numerics(subject.module.get_parameter("weight").device.type)
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
        if self.setting.memory_format == "channels_last" and x.dim() == 4:
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

    def check(self, model: nn.Module, x: Inputs) -> None:
        """Make sure that the backend can take the network. Raises what its load() does."""

        def load() -> dict[str, Any]:
            self._backend.load(model, x)
            return {"spread": 0.0}

        self.cache.get(f"{_described(model, x)} can be taken", load)

    def network(
        self, model: nn.Module, x: Inputs, subjects: Mapping[str, Subject], variants: Sequence[Variant], dense_ns: int | None
    ) -> tuple[list[int], bool]:
        """Nanoseconds of the dense network and of its variants; and whether the machine did something else as well.

        That is where the dense one takes longer than `dense_ns`, as before, by more than a fifth; it counts as noise.
        """

        def measure() -> dict[str, Any]:
            networks = [model]
            for variant in variants:
                pairs = {name: subjects[name].pair(scheme, rank) for name, (scheme, rank) in variant.items()}
                networks.append(with_pairs(model, {name: subjects[name].module for name in variant}, pairs).eval())
            ms, noise = self._time(networks, x, None if dense_ns is None else dense_ns / 1e6)
            return {"ms": ms, "spread": noise, "busy": dense_ns is not None and 1e6 * ms[0] > (1 + NOISY) * dense_ns}

        found = self._known(_described(model, x, [dict(v) for v in variants]), measure)
        return [round(ms * 1e6) for ms in found["ms"]], found["busy"]

    def _known(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        found = self.cache.get(key, measure)
        self.spreads.append(found["spread"])
        return found

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


def _described(model: nn.Module, x: Inputs, more: object = None) -> str:
    """A text that differs where the network, its inputs or `more` differs."""
    inputs = shapes(x), [(t.stride(), t.dtype) for t in tensors(x)]
    types = [(p.dtype, is_channels_last(p)) for p in model.parameters()]
    before = [_plain_attributes(module) for module in model.modules()]
    kind = f"{type(model).__module__}.{type(model).__qualname__} {count(model, x).macs}"  # forwards differ under one repr
    after = [_plain_attributes(module) for module in model.modules()]
    parts = [a for a, b in zip(before, after, strict=True) if a == b]  # a module may count its calls
    code = [_code(function) for kind_of in {type(m): None for m in model.modules()} for function in _own_functions(kind_of)]
    numerics = _numerics(next((p.device.type for p in model.parameters()), "cpu"))
    digest = hashlib.sha256(f"{kind} {model} {parts} {types} {code} {inputs} {numerics} {more}".encode()).hexdigest()[:16]
    return f"{type(model).__name__} {digest} on {list(shapes(x))}"


def _own_functions(kind: type) -> Iterator[FunctionType]:
    """Those of a type of module and its bases, but for torch's own: a network's forward may compute what no repr shows."""
    for base in kind.__mro__:
        if not base.__module__.startswith("torch."):
            yield from (value for value in vars(base).values() if isinstance(value, FunctionType))


def _code(function: FunctionType) -> str:
    """What a function does, as text, without where it stands."""

    def told(code: CodeType) -> list[Any]:
        constants = [told(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts if not isinstance(c, frozenset)]
        return [code.co_code.hex(), code.co_names, constants]

    return str(told(function.__code__))


def _numerics(device: str) -> str:
    """In what precision a network computes beside its own types: autocast's, and what stands in for float32."""
    narrowed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    autocast = torch.get_autocast_dtype(device) if narrowed else None
    narrowed_by: list[object] = [float32_products()]
    if device == "cuda":
        cudnn = torch.backends.cudnn
        with suppress(RuntimeError):  # of settings of both the older and the newer kind
            narrowed_by += [cudnn.allow_tf32, cudnn.benchmark]
    return f"autocast {autocast}, float32 {narrowed_by}"


def _plain_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """Those that a repr may leave out, such as the number of heads, and the name of a forward that wraps the module's own."""
    own = [(name, _plain(value)) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
    forward = vars(module).get("forward")
    wrapper = [] if forward is None else [("forward", getattr(forward, "__qualname__", type(forward).__qualname__))]
    return [(name, value) for name, value in own if value is not None] + wrapper


def _plain(value: Any) -> Any:
    """Numbers, texts, what holds only such, and the configuration of a transformers model; None for all else."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if hasattr(value, "to_json_string") and not isinstance(value, type):
        return value.to_json_string(), getattr(value, "_attn_implementation", None)
    return None


@torch.no_grad()
def _filled(module: nn.Module) -> nn.Module:
    """The module with weights that keep outputs of ordinary size: what is no number, or tiny, takes another time."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=1 / math.sqrt(max(1, parameter[0].numel())))
    return module
