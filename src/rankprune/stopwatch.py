"""What share of a training goes into TRP's own work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rankprune.machine import synchronizer


class Stopwatch:
    """Adds up the seconds spent inside, and those between the first entry and the last exit."""

    def __init__(self) -> None:
        self.inside = 0.0
        self._first: float | None = None
        self._last = 0.0

    @contextmanager
    def running(self, device: torch.device | None = None) -> Iterator[None]:
        """Count the seconds of the block. Given a device that computes asynchronously, wait for it before and after."""
        wait = synchronizer(device or torch.device("cpu"))
        wait()
        begin = time.perf_counter()
        self._first = begin if self._first is None else self._first
        try:
            yield
        finally:
            wait()
            self._last = time.perf_counter()
            self.inside += self._last - begin

    @property
    def overhead(self) -> float:
        """Seconds inside by seconds outside; 0 before there is anything to compare."""
        outside = 0.0 if self._first is None else self._last - self._first - self.inside
        return self.inside / outside if outside > 0 else 0.0
