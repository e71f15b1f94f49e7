"""Pictures: accuracy against cost, singular spectra before and after, ranks over training, a layer against its rank."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankprune.comparison import CurvePoint
from rankprune.errors import MissingExtraError
from rankprune.report.axes import DEPTH
from rankprune.report.names import drawn_together, told_apart
from rankprune.report.results import Result, mean_of, seeds_together
from rankprune.report.tables import rank_history

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 2
"""How many stand beside each other, to be read on a page."""
LISTED = 20
"""So many layers have names in a picture; of more only the first and the last."""

Spectra = Mapping[str, Sequence[float]]
History = Sequence[tuple[float, Mapping[str, int]]]


def plot_training(path: str | Path, before: Spectra, after: Spectra, history: History, time: str = "optimizer step") -> None:
    """Draw the spectra of layers in two networks of the same architecture, and the ranks over the training of the second.

    Args:
        path: of the picture, .png or .svg.
        before: for each layer its singular values relative to the largest, as planned_spectra gives them.
        after: the same of the network trained with TRP, projected.
        history: times and the ranks then chosen, like TRP.history; without any, the third picture is left out.
        time: what the times are.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure = _figure((12, 4.2) if history else (8.5, 4.2))
    axes = figure.subplots(1, 3 if history else 2)
    colours = _by_depth([*dict.fromkeys((*before, *after))])
    for ax, spectra, title in zip(axes, (before, after), ("before", "after"), strict=False):
        for name, values in spectra.items():
            shares = [i / len(values) for i in range(1, len(values) + 1)]
            ax.semilogy(shares, [max(v, 1e-9) for v in values], label=name, color=colours[name], linewidth=1.2)
        ax.set(title=title, xlabel="index / full rank", ylabel="singular value / largest", ylim=(1e-5, 1.5))
    if history:
        for name, values in after.items():
            chosen = [(when, ranks[name] / len(values)) for when, ranks in history if name in ranks]
            axes[2].plot(*zip(*chosen, strict=True) if chosen else ((), ()), label=name, color=colours[name], linewidth=1.2)
        axes[2].set(title="ranks chosen in training", xlabel=time, ylabel="rank / full rank", ylim=(0, None))
    if len(after) <= LISTED:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="x-small", frameon=False)
    else:
        names = list(after)
        figure.supxlabel(f"{len(names)} layers, from {names[0]} (dark) to {names[-1]} (light)", fontsize="small")
    _save(figure, axes, path)


def _by_depth(names: Sequence[str]) -> dict[str, Any]:
    """A colour for each layer, dark for the first and light for the last."""
    import matplotlib as mpl

    shades = mpl.colormaps["viridis"]
    return {name: shades(0.95 * i / max(1, len(names) - 1)) for i, name in enumerate(names)}


def plot_accuracy(path: str | Path, results: Sequence[Result]) -> None:
    """Draw top-1 accuracy against the share of MACs that is left, one panel for each network and its images, seeds averaged.

    Networks that are there only dense get no panel, unless all are. What is far below the best of a panel stands as an
    arrow at its lower edge, with its accuracy.

    Raises:
        MissingExtraError: without matplotlib.
    """
    panels = drawn_together(results)
    drawn = [panel for panel in panels if any(r["method"] != "dense" for r in panel[1])] or panels
    columns = min(len(drawn), PANELS)
    rows = -(-len(drawn) // columns)
    figure = _figure((5.5 * columns, 4.2 * rows))
    places = figure.subplots(rows, columns, squeeze=False).flat
    axes = [next(places) for _ in drawn]
    for place in places:
        place.remove()
    for ax, (title, together) in zip(axes, drawn, strict=True):
        groups = seeds_together(together)
        lines: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
        name_of, dashes = told_apart([group[0] for group in groups]), cycle(("--", ":", "-."))
        for group in groups:
            tops = [r["top1"] for r in group]
            mean = sum(tops) / len(tops)
            share = mean_of(group)["macs"] / group[0]["macs_dense"]
            lines[name_of(group[0])].append((share, mean, mean - min(tops), max(tops) - mean))
        best = max(top for points in lines.values() for _, top, _, _ in points)
        for name, points in lines.items():
            shares, tops, below, above = zip(*sorted(points), strict=True)
            if name.startswith("dense"):
                for top in tops:
                    ax.axhline(top, color="grey", linewidth=1, linestyle=next(dashes), label=name)
            else:
                line, *_ = ax.errorbar(
                    shares, tops, yerr=(below, above), marker="o", markersize=4, linewidth=1.2, capsize=2, label=name
                )
                _point_down(ax, [(share, top) for share, top, *_ in points if top < best - DEPTH], best, line.get_color())
        ax.set(title=title, xlabel="share of MACs left", ylabel="top-1 accuracy, %", xlim=(0, 1))
        ax.legend(fontsize="x-small", frameon=False)
    _save(figure, axes, path)


def _point_down(ax: Any, points: Sequence[tuple[float, float]], best: float, colour: Any) -> None:
    """Arrows at the lower edge of the panel for points that are below it."""
    for share, top in points:
        ax.plot(share, best - DEPTH, marker="v", markersize=6, color=colour)
        ax.annotate(f"{top:.1f}", (share, best - DEPTH), (6, -3), textcoords="offset points", fontsize="x-small")
        ax.set_ylim(bottom=best - DEPTH - 0.3, top=best + 0.6)


def plot_results(folder: str | Path, results: Sequence[Result]) -> list[Path]:
    """Draw accuracy.svg of all results, and for each one that holds spectra a file that is named after it; returns the files.

    Raises:
        MissingExtraError: without matplotlib.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "accuracy.svg"]
    plot_accuracy(files[0], results)
    for r in results:
        if "spectra" in r:
            stem = re.sub(r"[^\w.-]+", "-", r["name"]).strip("-.") or "run"
            taken = {file.stem for file in files}
            name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(results) + 2))) if n not in taken)
            files.append(folder / f"{name}.svg")
            plot_training(files[-1], r["spectra"]["before"], r["spectra"]["after"], rank_history(r), time="epoch")
    return files


def plot_layer(path: str | Path, points: Sequence[CurvePoint], title: str) -> None:
    """Draw the time and the MACs of a layer's pairs, relative to the dense layer's, against the rank, one panel a scheme.

    Raises:
        MissingExtraError: without matplotlib.
    """
    schemes = list(dict.fromkeys(p.scheme for p in points))
    figure = _figure((4.2 * len(schemes), 3.8))
    axes = figure.subplots(1, len(schemes), squeeze=False, sharey=True)[0]
    for ax, scheme in zip(axes, schemes, strict=True):
        mine = [p for p in points if p.scheme == scheme]
        ranks = [p.rank for p in mine]
        ax.plot(ranks, [p.ms for p in mine], marker=".", label="time")
        ax.plot(ranks, [p.macs for p in mine], linestyle="--", label="MACs")
        ax.axhline(1.0, color="gray", linewidth=0.8)
        ax.set(title=scheme, xlabel="rank", ylim=(0, 2))
    axes[0].set_ylabel("of the dense layer")
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    _save(figure, axes, path)


def require_matplotlib() -> None:
    """Make sure that pictures can be drawn.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot") from error


def _figure(size: tuple[float, float]) -> "Figure":
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "rankprune"  # the same results draw the same file
    return Figure(figsize=size, layout="constrained")


def _save(figure: "Figure", axes: "Sequence[Axes]", path: str | Path) -> None:
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    metadata: dict[str, Any] | None = {"Date": None} if Path(path).suffix == ".svg" else None
    figure.savefig(path, dpi=150, metadata=metadata)
