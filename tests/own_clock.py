"""A clock of our own for latencies: what they are then does not depend on the machine."""

import pytest
import torch
from torch import Tensor, nn

from rankprune import backends, comparison
from rankprune.backends import Backend, Program
from rankprune.backends.pytorch import Eager
from rankprune.cost import parameter_count
from rankprune.distributed import Team
from rankprune.inputs import Inputs
from rankprune.latency import LatencyTable, meter
from rankprune.planner import Planner
from rankprune.rules import Budget
from rankprune.timing import time_together

MS_PER_PARAMETER, MS_PER_LAYER = 4e-4, 0.3


def timed(program: Program, ms: float) -> Program:
    """The program, for which our clock will show this time."""
    program.ms = ms  # type: ignore[attr-defined]
    return program


def clock(programs: list[Program], x: Inputs, rounds: int = 15) -> list[list[float]]:
    """Our clock for what has a time of its own, the real one for all else; it runs all, as the real one does."""
    if all(hasattr(program, "ms") for program in programs):
        for program in programs:
            program(x)
        return [[program.ms] * rounds for program in programs]  # type: ignore[attr-defined]
    return time_together(programs, x, rounds)


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure by our clock."""
    monkeypatch.setattr(meter, "time_together", clock)
    monkeypatch.setattr(comparison, "time_together", clock)


class Timeless(Backend):
    """Takes a time by our clock that is proportional to the parameters, and one more for each layer; computes nothing.

    `ms_per_square` is for the square of the parameters of a whole network, so that its layers do not save what they save by
    themselves.
    """

    name = "timeless"
    ranks = 8

    def __init__(self, ms_per_square: float = 0) -> None:
        self.ms_per_square = ms_per_square

    def _load(self, model: nn.Module, x: Inputs) -> Program:
        def program(x: Inputs) -> list[Tensor]:
            return []

        layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
        ms = MS_PER_PARAMETER * parameter_count(model) + MS_PER_LAYER * layers
        if any(isinstance(m, nn.Flatten) for m in model.modules()):
            ms += self.ms_per_square * parameter_count(model) ** 2
        return timed(program, ms)


class TimedEager(Eager):
    """Eager PyTorch, its programs as they are, their times by our clock."""

    def _load(self, model: nn.Module, x: Inputs) -> Program:
        return timed(super()._load(model, x), MS_PER_PARAMETER * parameter_count(model))


def add(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    """Make it one of the backends."""
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, backend.name: backend})


def count_timings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many programs were timed together each time from now on."""
    found: list[int] = []

    def counted(programs: list[Program], x: Inputs, rounds: int = 15) -> list[list[float]]:
        found.append(len(programs))
        return clock(programs, x, rounds)

    monkeypatch.setattr(meter, "time_together", counted)
    return found


def network() -> tuple[nn.Module, Tensor]:
    """A narrow layer, which no pair makes faster, and wide ones."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 8, 1),
        nn.Conv2d(8, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
    ]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(2, 3, 4, 4)


def budget(fraction: float) -> Budget:
    return Budget(latency=fraction, backend="timeless")


def measured(model: nn.Module, x: Tensor, rule: Budget, scheme: str = "auto") -> LatencyTable:
    """The table that a plan would be made by."""
    planner = Planner(model, scheme=scheme, rule=rule, example_inputs=x)
    planner.join(Team.alone())
    assert planner.latency is not None
    return planner.latency.known
