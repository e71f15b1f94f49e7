"""Axes of pictures: from values to pixels, and where the ticks go."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DEPTH = 12
"""So many points of accuracy below its best a picture shows; what is further down is told at its lower edge."""


@dataclass(frozen=True)
class Axis:
    """Maps low..high onto the pixels start..end, linearly or in powers of ten; what lies outside goes to the nearer end.

    Ticks, of a linear one, are `step` apart, or at round distances.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    step: float | None = None

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log10(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Round values within, about five of them."""
        step = self.step or _round_step((self.high - self.low) / 5)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def axis_of(values: Iterable[float], start: float, end: float) -> Axis:
    """A linear axis that holds all values and ends at ticks on both sides."""
    values = list(values)
    low, high = min(values), max(values)
    step = _round_step(max(high - low, abs(high) * 0.02, 1e-9) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, max(last, first + 1) * step, start, end, step=step)


def _round_step(width: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is no less than `width`."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(k * power for k in (1, 2, 5, 10) if k * power >= width * (1 - 1e-9))


def tick_labels(values: Sequence[float]) -> list[str]:
    """The values of ticks in few characters, each: three figures, or as many as it takes to tell them apart."""
    return next(
        labels
        for figures in range(3, 17)
        if len(set(labels := [tick_label(value, figures) for value in values])) == len(set(values)) or figures == 16
    )


def tick_label(value: float, figures: int = 3) -> str:
    """A tick's value in few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.10g}{unit}"
    return f"{value:.{figures}g}" if abs(value) >= 0.01 or value == 0 else f"{value:.0e}".replace("e-0", "e-")
