"""rankprune demo."""

from pathlib import Path
from typing import Annotated

import typer

from rankprune.checkpoint import save
from rankprune.cli.console import TrainingBars, say, show_table
from rankprune.projection import planned_spectra
from rankprune.recipes.digits import demonstrate
from rankprune.report.plots import plot_training, require_matplotlib


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("rankprune-demo"), epochs: int = 15, seed: int = 0
) -> None:
    """Make a small network for handwritten digits smaller, in one shot and by TRP with the same budget."""
    require_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    with TrainingBars(epochs) as bars:
        shown = demonstrate(epochs=epochs, seed=seed, on_step=bars.update)
    dense = shown.rows[0]
    show_table(
        f"Handwritten digits, ResNet-14, {epochs} epochs each, no fine-tuning",
        ["network", "accuracy %", "MACs", "fewer", "params", f"ms for {shown.batch} images"],
        [
            (r.name, f"{r.top1:.1f}", f"{r.macs:,}", f"{dense.macs / r.macs:.2f}x", f"{r.params:,}", f"{r.ms:.1f}")
            for r in shown.rows
        ],
    )
    save(out / "artefact", shown.small, shown.plan)
    shown.plan.save(out / "plan.json")
    before, after = (planned_spectra(network, shown.plan) for network in (shown.dense, shown.trained))
    plot_training(out / "spectra.png", before, after, shown.history)
    say(f"decomposed model  {out / 'artefact'}   (rankprune.load)")
    say(f"plan              {out / 'plan.json'}   ({len(shown.plan.decomposed)} layers decomposed)")
    say(f"spectra, ranks    {out / 'spectra.png'}")
