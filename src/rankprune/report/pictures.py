"""Pictures as inline SVG. They take colours and fonts from the page's style sheet, so that they follow light and dark."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar
from xml.etree.ElementTree import Element

from rankprune.plan import LayerPlan
from rankprune.report.axes import DEPTH, Axis, axis_of, tick_labels
from rankprune.report.markup import element
from rankprune.report.results import of_full

T = TypeVar("T")

WIDTH = 360
"""Of all pictures but the small ones, in pixels: what a phone shows."""
NAMES = 114
"""Of those, how many hold the names of layers."""
ROW = 14
CHARACTER = 8
"""Pixels that a figure is wide, at most."""


@dataclass(frozen=True)
class Point:
    """A mark in a scatter plot; `low` and `high` are the ends of its whisker, `tip` is the text under the pointer."""

    x: float
    y: float
    low: float
    high: float
    colour: int
    shape: str
    tip: str


def scatter(
    points: Sequence[Point], x_title: str, y_title: str, said: str, reference: float, whole: tuple[float, float] | None = None
) -> Element:
    """Marks over two axes, with a vertical line where x is `reference`; x spans `whole`, or just the points.

    A mark far below, by more than DEPTH from the highest, stands at the lower edge, with its value beside or above it.
    """
    height, bottom = 254, 214
    left, right = 50, WIDTH - 12
    x = Axis(*whole, left, right) if whole else axis_of([*(p.x for p in points), reference], left, right)
    floor = max(p.y for p in points) - DEPTH
    y = axis_of([max(value, floor) for p in points for value in (p.low, p.high)], bottom, 14)
    parts = _frame(x, y, bottom, x_title, y_title)
    parts.append(element("line", x1=x(reference), x2=x(reference), y1=14, y2=bottom, class_="reference"))
    deep: list[float] = []
    for p in points:
        whisker = element("line", x1=x(p.x), x2=x(p.x), y1=y(p.low), y2=y(p.high), class_="line")
        mark = element("g", element("title", p.tip), class_=f"k{p.colour}")
        mark.extend([whisker] if p.high > p.low else [])
        mark.append(element("path", d=_mark(p.shape, x(p.x), y(p.y)), class_="mark"))
        parts.append(mark)
        if p.y < y.low:
            level = sum(abs(x(p.x) - other) < 60 for other in deep)  # figures of close marks stand one above the other
            beside, side = (-9, "end") if x(p.x) + 60 > right else (9, "start")
            parts.append(element("text", f"\u2193 {p.y:.1f}", x=x(p.x) + beside, y=bottom - 6 - 13 * level, class_=side))
            deep.append(x(p.x))
    return _svg(WIDTH, height, said, parts)


def swatch(colour: int, shape: str) -> Element:
    """The mark of a legend's entry."""
    mark = element("path", d=_mark(shape, 7, 7), class_="mark")
    return element("svg", mark, viewBox="0 0 14 14", class_=f"swatch k{colour}", aria_hidden="true")


def curve(values: Sequence[tuple[float, float]], x_title: str, y_title: str, said: str) -> Element:
    """One line through points."""
    height, bottom = 194, 154
    x = Axis(values[0][0], values[-1][0], 50, WIDTH - 12)
    y = axis_of([0.0, *(b for _, b in values)], bottom, 14)
    parts = _frame(x, y, bottom, x_title, y_title)
    parts.append(element("path", d=_path([(x(a), y(b)) for a, b in values]), class_="line k1"))
    radius = 2.5 if len(values) <= 40 else 1
    for a, b in values:
        parts.append(element("circle", element("title", f"{a:g}: {b:.4g}"), cx=x(a), cy=y(b), r=radius, class_="mark k1"))
    return _svg(WIDTH, height, said, parts)


def heat_map(
    history: Sequence[tuple[int, Mapping[str, int]]], full: Mapping[str, int], names: Sequence[str], said: str
) -> Element:
    """The rank of each layer after each epoch, fullest in colour where the layer had its highest; grey where it was dense.

    Of a long history some epochs are shown, evenly spaced, with the last.
    """
    history = [entry for _, entry in _thinned(history, 40)]
    last = {name: of_full(history[-1][1].get(name), full.get(name)) for name in names}
    left, right, top = NAMES, _beside(last.values()), 6
    bottom = top + ROW * len(names)
    x = Axis(0, len(history), left, right)
    parts = []
    for i, name in enumerate(names):
        y = top + ROW * i
        ranks = [ranks.get(name) for _, ranks in history]
        most, of, start, cells = max(rank or 0 for rank in ranks), full.get(name), 0, []
        for rank, run in groupby(ranks):
            end = start + len(list(run))
            begun, ended = history[start][0], history[end - 1][0]
            when = f"epoch {begun}" if begun == ended else f"epochs {begun} to {ended}"
            tip = element("title", f"{when}: {of_full(rank, of)}")
            look = {"class_": "dense"} if rank is None else {"fill_opacity": 0.08 + 0.92 * rank / most}
            width = x(end) - x(start) - 0.8
            cells.append(element("rect", tip, x=x(start), y=y + 1, width=width, height=ROW - 2, **look))
            start = end
        parts += [_layer_name(name, y), element("g", cells, class_="heat k1")]
        parts.append(element("text", last[name], x=right + 4, y=y + ROW - 4))
    quarters = dict.fromkeys(round(k * (len(history) - 1) / 4) for k in range(5))
    for i in quarters:
        parts.append(element("text", str(history[i][0]), x=(x(i) + x(i + 1)) / 2, y=bottom + 13, class_="middle"))
    parts.append(element("text", "epoch", x=(left + right) / 2, y=bottom + 28, class_="middle title"))
    return _svg(WIDTH, bottom + 34, said, parts)


def bars(layers: Sequence[LayerPlan], examples: str, said: str) -> Element:
    """For each layer a wide pale bar, its MACs before, and a narrow full one, those after, both of so many `examples`."""
    ranks = [of_full(e.rank if e.becomes_pair else None, e.full_rank) for e in layers]
    left, right, top = NAMES, _beside(ranks), 6
    bottom = top + ROW * len(layers)
    x = Axis(0, max((e.macs_before or 0) for e in layers) or 1, left, right)
    parts = _grid(x, top, bottom)
    for i, (e, rank) in enumerate(zip(layers, ranks, strict=True)):
        y, before, after = top + ROW * i, e.macs_before or 0, e.macs_after or 0
        what = (
            f"rank {e.rank} of {e.full_rank}, {before:,} to {after:,} MACs"
            if e.becomes_pair
            else f"{before:,} MACs, {e.reason}"
        )
        wide = element("rect", x=left, y=y + 1, width=max(x(before) - left, 0.5), height=ROW - 2, class_="before")
        narrow = element("rect", x=left, y=y + 4, width=max(x(after) - left, 0.5), height=ROW - 8, class_="mark k1")
        parts.append(element("g", element("title", f"{e.name}: {what}"), wide, *([narrow] if e.becomes_pair else [])))
        parts.append(_layer_name(e.name, y))
        parts.append(element("text", rank, x=right + 4, y=y + ROW - 4))
    parts.append(element("text", f"MACs of {examples}", x=(left + right) / 2, y=bottom + 33, class_="middle title"))
    return _svg(WIDTH, bottom + 38, said, parts)


def spectrum(before: Sequence[float], after: Sequence[float], rank: int | None, said: str) -> Element:
    """Singular values of one layer relative to the largest on a logarithmic axis, down to 1e-4, and a line at its rank."""
    width, height, left, bottom = 160, 100, 32, 80
    x, y = Axis(1, max(len(before), len(after), 2), left, width - 6), Axis(1e-4, 1, bottom, 8, log=True)
    parts = [element("line", x1=left, x2=width - 6, y1=y(t), y2=y(t), class_="grid") for t in (1, 1e-2, 1e-4)]
    parts += [element("text", t, x=left - 4, y=y(float(t)) + 4, class_="end") for t in ("1", "0.01", "1e-4")]
    parts += [element("text", "1", x=left + 2, y=bottom + 14, class_="middle")]
    parts += [element("text", f"{x.high:g}", x=width - 6, y=bottom + 14, class_="end")]
    if rank is not None:
        parts.append(element("line", x1=x(rank), x2=x(rank), y1=8, y2=bottom, class_="reference"))
    for values, style in ((before, "line k0"), (after, "line k1")):
        if values:
            points = [(x(i), y(v)) for i, v in _thinned(values, 80)]
            floor = next((i for i, (_, down) in enumerate(points) if down == bottom), len(points))
            parts.append(element("path", d=_path([*points[: floor + 1], *points[floor + 1 :][-1:]]), class_=style))
    return _svg(width, height, said, parts)


def _thinned(values: Sequence[T], most: int) -> list[tuple[int, T]]:
    """The values with their indices from 1; of more than `most` some, evenly spaced, with the first and the last."""
    last = len(values) - 1
    kept = dict.fromkeys(round(i * last / (most - 1)) for i in range(most)) if last >= most else range(len(values))
    return [(i + 1, values[i]) for i in kept]


def _svg(width: float, height: float, said: str, parts: Sequence[Element]) -> Element:
    return element("svg", parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=said)


def _frame(x: Axis, y: Axis, bottom: float, x_title: str, y_title: str) -> list[Element]:
    parts = [element("line", x1=x.start, x2=x.end, y1=y(t), y2=y(t), class_="grid") for t in y.ticks()]
    labels = zip(y.ticks(), tick_labels(y.ticks()), strict=True)
    parts += [element("text", label, x=x.start - 5, y=y(t) + 4, class_="end") for t, label in labels]
    parts += _grid(x, y.end, bottom)
    parts.append(element("text", x_title, x=(x.start + x.end) / 2, y=bottom + 33, class_="middle title"))
    middle = (y.start + y.end) / 2
    parts.append(element("text", y_title, x=12, y=middle, transform=f"rotate(-90 12 {middle:g})", class_="middle title"))
    return parts


def _grid(x: Axis, top: float, bottom: float) -> list[Element]:
    ticks = x.ticks()
    parts = [element("line", x1=x(t), x2=x(t), y1=top, y2=bottom, class_="grid") for t in ticks]
    labels = zip(ticks, tick_labels(ticks), strict=True)
    return parts + [element("text", label, x=x(t), y=bottom + 17, class_="middle") for t, label in labels]


def _beside(texts: Iterable[str]) -> float:
    """Where a picture ends to have room for these beside it."""
    return WIDTH - 8 - CHARACTER * max(map(len, texts))


def _layer_name(name: str, y: float) -> Element:
    shown = name if len(name) <= 16 else f"{name[:7]}…{name[-8:]}"  # the numbers of blocks stand in front
    return element("text", element("title", name), shown, x=NAMES - 6, y=y + ROW - 4, class_="end")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _mark(shape: str, x: float, y: float) -> str:
    """The outline of a mark around (x, y)."""
    if shape == "circle":
        return f"M{x - 4.5:.1f} {y:.1f}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z"
    corners = {
        "square": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        "triangle": [(0, -5), (5, 4), (-5, 4)],
        "diamond": [(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)],
        "cross": [(-4, -4), (0, -1.5), (4, -4), (1.5, 0), (4, 4), (0, 1.5), (-4, 4), (-1.5, 0)],
        "bar": [(-6, -1.8), (6, -1.8), (6, 1.8), (-6, 1.8)],
    }[shape]
    return _path([(x + a, y + b) for a, b in corners]) + "Z"
