"""rankprune evaluate and rankprune count."""

from pathlib import Path
from typing import Annotated

import typer

from rankprune.cli.console import say, show_table
from rankprune.cli.options import Artefact, Checkpoint, InputShape, ModelSpec
from rankprune.cli.target import build_model, example_input
from rankprune.cost import count as count_cost
from rankprune.recipes.batches import Normalize, eval_batches
from rankprune.recipes.evaluation import top1
from rankprune.recipes.images import IMAGENET_MEAN, IMAGENET_STD, load_images
from rankprune.timing import measure_together


def evaluate(
    model: ModelSpec,
    data: Annotated[Path, typer.Option(help="CIFAR-10 files, parquet or an image folder.")],
    checkpoint: Checkpoint = None,
    artefact: Artefact = None,
    split: str = "test",
    size: Annotated[int | None, typer.Option(help="Resize images to size x size.")] = None,
    batch: int = 500,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> None:
    """Top-1 accuracy of a dense or decomposed classifier on images."""
    images = load_images(data, split, size)
    accuracy = top1(build_model(model, checkpoint, artefact), eval_batches(images, batch, Normalize(mean, std)))
    say(f"top-1 {accuracy:.2f} % of {len(images)} images")


def count(
    model: ModelSpec,
    input: InputShape,
    checkpoint: Checkpoint = None,
    artefact: Artefact = None,
    time: Annotated[bool, typer.Option(help="Also measure milliseconds.")] = False,
) -> None:
    """Multiply-accumulates and parameters, per layer and in all."""
    network = build_model(model, checkpoint, artefact)
    x = example_input(input, network)
    cost = count_cost(network, x)
    rows = [(r.name or "(model)", r.kind, f"{r.macs:,}", f"{r.params:,}") for r in cost.layers if r.macs or r.params]
    show_table(f"{model} on {input}", ["layer", "type", "MACs", "params"], rows)
    say(f"MACs {cost.macs:,} (outside of modules: {cost.functional_macs:,}), parameters {cost.params:,}")
    if cost.uncounted:
        say(f"not counted: {', '.join(cost.uncounted)}")
    if time:
        timing = measure_together({"": network}, x)[""]
        say(f"{timing.median_ms:.2f} ms (median of {timing.runs}, spread {timing.spread:.0%}, {timing.threads} threads)")
