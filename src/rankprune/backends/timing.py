"""Timing several programs so that the comparison is fair."""

import statistics
import time
from collections.abc import Sequence

import torch

from rankprune.backends.base import Program, tensors
from rankprune.cost import Inputs, synchronizer

_SHORTEST_S = 5e-4


def time_together(programs: Sequence[Program], x: Inputs, rounds: int = 15) -> list[list[float]]:
    """Milliseconds of each program in each round: (programs, rounds).

    In a round all programs run in turn, so that a change of the machine's speed hits all alike; short ones run several times.
    """
    synchronize = synchronizer(next((t.device for t in tensors(x)), torch.device("cpu")))
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
    """(third - first quartile) / median."""
    first, middle, third = statistics.quantiles(values, n=4)
    return (third - first) / middle
