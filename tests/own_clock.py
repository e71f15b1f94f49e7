"""A clock of our own for latencies: what they are then does not depend on the machine."""

import pytest

from rankprune import comparison
from rankprune.backends import Program
from rankprune.backends.timing import time_together
from rankprune.cost import Inputs
from rankprune.latency import meter


def timed(program: Program, ms: float) -> Program:
    """The program, for which our clock will show this time."""
    program.ms = ms  # type: ignore[attr-defined]
    return program


def clock(programs: list[Program], x: Inputs, rounds: int = 15) -> list[list[float]]:
    """Our clock for what has a time of its own, the real one for all else."""
    if all(hasattr(program, "ms") for program in programs):
        return [[program.ms] * rounds for program in programs]  # type: ignore[attr-defined]
    return time_together(programs, x, rounds)


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure by our clock."""
    monkeypatch.setattr(meter, "time_together", clock)
    monkeypatch.setattr(comparison, "time_together", clock)
