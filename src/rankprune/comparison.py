"""Networks against each other by the clock, on several backends, and one layer against its rank."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from torch import nn

from rankprune.backends import BACKENDS, backend_named
from rankprune.errors import RankPruneError
from rankprune.inputs import Inputs, cloned
from rankprune.latency import Subject, measure_layer, ranks_to_try
from rankprune.passes import undisturbed
from rankprune.survey import survey
from rankprune.timing import spread, time_together
from rankprune.wrappers import named_modules, unwrap


@dataclass(frozen=True)
class BackendTiming:
    """A network on a backend, on so many threads: the median of its milliseconds, and (third - first quartile) / median."""

    network: str
    backend: str
    version: str
    threads: int
    ms: float
    spread: float


@dataclass(frozen=True)
class Comparison:
    """Every network on every backend that could take them, and why others could not."""

    timings: tuple[BackendTiming, ...]
    failed: Mapping[str, str]


def installed_backends() -> list[str]:
    """The names of the backends whose packages are there."""
    return [name for name, backend in BACKENDS.items() if backend.installed]


def compare(
    networks: Mapping[str, nn.Module], x: Inputs, backends: Sequence[str], *, threads: int | None = None, rounds: int = 25
) -> Comparison:
    """Time networks on backends, all networks of a backend in turn within one loop, after a warm-up.

    Raises:
        RankPruneError: for a backend that there is not, or fewer than two rounds.
    """
    if rounds < 2:
        raise RankPruneError(f"rounds={rounds}: give at least 2, for a spread")
    x = cloned(x)
    timings: list[BackendTiming] = []
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        for network in networks.values():
            stack.enter_context(undisturbed(network))
        for name in backends:
            backend = backend_named(name)
            try:
                with backend.on_threads(threads):
                    programs = backend.load_each(list(networks.values()), x)
                    found, used = time_together(programs, backend.placed(x), rounds), backend.threads
            except RankPruneError as error:
                failed[name] = str(error)
                continue
            for network, times in zip(networks, found, strict=True):
                timings.append(BackendTiming(network, name, backend.version, used, median(times), spread(times)))
    return Comparison(tuple(timings), failed)


@dataclass(frozen=True)
class CurvePoint:
    """A layer as a pair of this scheme and rank, in parts of what it costs dense."""

    scheme: str
    rank: int
    macs: float
    ms: float


def layer_curve(
    model: nn.Module, x: Inputs, name: str, backend: str, *, scheme: str = "auto", threads: int | None = None, count: int = 32
) -> list[CurvePoint]:
    """What one layer costs at about `count` ranks of each scheme, by the clock and in MACs.

    Raises:
        RankPruneError: if there is no such layer.
    """
    model = unwrap(model)
    if name not in named_modules(model):
        raise RankPruneError(f"there is no layer {name!r}; the model's modules are named as in model.named_modules()")
    options = survey(model, scheme, x, [name], ()).options[name]
    ranks = {o.scheme: ranks_to_try(o.full_rank, count) for o in options}
    subject = Subject(options[0].layer.module, options[0].input_shapes, ranks)
    times = measure_layer(model, x, name, subject, backend, threads)
    points = []
    for o in options:
        for rank, ns in times.pair_ns[o.scheme.name].items():
            macs = rank * o.unit.of("macs") / o.dense.of("macs")
            points.append(CurvePoint(o.scheme.name, rank, macs, ns / times.dense_ns))
    return points
