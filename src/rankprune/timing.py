"""Timing models and programs, several in turn within one loop so that a comparison is fair."""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from rankprune.backends.base import Program
from rankprune.backends.pytorch import eager_program
from rankprune.errors import RankPruneError
from rankprune.inputs import Inputs, cloned, tensors
from rankprune.machine import cpu_name, gpus_in_use, synchronizer
from rankprune.passes import undisturbed

_SHORTEST_S = 5e-4


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one forward pass, over `runs` rounds; `spread` is (third - first quartile) / median."""

    median_ms: float
    spread: float
    min_ms: float
    runs: int
    threads: int
    dtype: str
    device: str
    torch: str
    cpu: str


def measure(model: nn.Module, x: Inputs, *, runs: int = 30) -> Timing:
    """Time forward passes of `model` on `x` in eval and inference mode, after a warm-up, with device synchronisation.

    Raises:
        RankPruneError: for fewer than one run.
    """
    return measure_together({"": model}, x, runs=runs)[""]


def measure_together(models: Mapping[str, nn.Module], x: Inputs, *, runs: int = 30) -> dict[str, Timing]:
    """Time several models in turn within one loop, so that a change of the machine's speed hits all of them alike."""
    if runs < 1:
        raise RankPruneError(f"runs={runs}: give at least one run")
    held = (t for m in models.values() for t in m.parameters())
    first = next(chain(held, tensors(x)), torch.empty(0))
    x = cloned(x)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(undisturbed(model))
        times = time_together([eager_program(model, x) for model in models.values()], x, runs, first.device)
    return {
        name: Timing(
            median_ms=statistics.median(values),
            spread=spread(values),
            min_ms=min(values),
            runs=len(values),
            threads=torch.get_num_threads(),
            dtype=str(first.dtype).removeprefix("torch."),
            device=str(first.device),
            torch=torch.__version__,
            cpu=cpu_name(),
        )
        for name, values in zip(models, times, strict=True)
    }


def time_together(
    programs: Sequence[Program], x: Inputs, rounds: int = 15, device: torch.device | None = None
) -> list[list[float]]:
    """Milliseconds of each program in each round: (programs, rounds).

    In a round all programs run in turn, so that a change of the machine's speed hits all alike; short ones run several times.

    Args:
        device: what they compute on, beside GPUs; None is where the inputs are.
    """
    synchronize = synchronizer(device or next((t.device for t in tensors(x)), torch.device("cpu")), *gpus_in_use())
    repeats = []
    for program in programs:
        program(x)  # the warm-up
        synchronize()
        begin = time.perf_counter()
        program(x)
        synchronize()
        repeats.append(max(1, min(20, round(_SHORTEST_S / (time.perf_counter() - begin)))))
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds):
        for program, repeat, found in zip(programs, repeats, times, strict=True):
            begin = time.perf_counter()
            for _ in range(repeat):
                program(x)
            synchronize()
            found.append((time.perf_counter() - begin) / repeat * 1e3)
    return times


def spread(values: Sequence[float]) -> float:
    """(third - first quartile) / median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(values, n=4)
    return (third - first) / middle
