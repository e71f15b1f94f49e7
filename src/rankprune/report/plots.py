"""Pictures: singular spectra before and after, ranks over training."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from rankprune.errors import MissingExtraError
from rankprune.plan import Plan
from rankprune.projection import factor_planned


def plot_training(
    path: str | Path, plan: Plan, dense: nn.Module, trained: nn.Module, history: Sequence[tuple[int, dict[str, int]]]
) -> None:
    """Draw the spectra of the planned layers in two networks of the same architecture, and the ranks over the steps.

    Args:
        path: of the picture, .png or .svg.
        dense: trained as usual.
        trained: trained with TRP, projected.
        history: TRP.history.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot") from error
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    before, after, ranks = figure.subplots(1, 3)
    for axes, model, title in ((before, dense, "trained as usual"), (after, trained, "trained with TRP")):
        for (name, _), basis in factor_planned(model, plan).items():
            energy = basis.values.square().sum(0).sqrt().cpu()
            shares = [i / len(energy) for i in range(1, len(energy) + 1)]
            axes.semilogy(shares, (energy / energy[0]).clamp(min=1e-9), label=name, linewidth=1.2)
        axes.set(title=title, xlabel="index / full rank", ylabel="singular value / largest", ylim=(1e-5, 1.5))
    full = {name: entry.full_rank or 1 for name, entry in plan.decomposed.items()}
    for name in full:
        steps = [step for step, at in history if name in at]
        ranks.plot(steps, [at[name] / full[name] for _, at in history if name in at], label=name, linewidth=1.2)
    ranks.set(title="ranks chosen in training", xlabel="optimizer step", ylabel="rank / full rank", ylim=(0, None))
    if len(full) <= 20:
        figure.legend(*ranks.get_legend_handles_labels(), loc="outside right center", fontsize="x-small", frameon=False)
    for axes in (before, after, ranks):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
