"""rankprune evaluate and rankprune count."""

from itertools import chain
from typing import Annotated

import torch
import typer

from rankprune.cli.console import say
from rankprune.cli.options import Artefact, Checkpoint, InputShape, ModelSpec, refuse
from rankprune.cli.target import build_model, device_of, example_input, tell_untrained
from rankprune.cost import count as count_cost
from rankprune.errors import RankPruneError
from rankprune.passes import undisturbed
from rankprune.recipes.batches import Normalize, eval_batches
from rankprune.recipes.evaluation import logits_of, top1
from rankprune.recipes.images import IMAGENET_MEAN, IMAGENET_STD, load_images
from rankprune.recipes.photograph_batches import PhotographConfig, centre_batches
from rankprune.recipes.photographs import load_photographs
from rankprune.timing import measure


def evaluate(
    context: typer.Context,
    model: ModelSpec,
    data: Annotated[str, typer.Option(help="CIFAR-10 files, parquet, an image folder, or hub:NAME.")],
    checkpoint: Checkpoint = None,
    artefact: Artefact = None,
    split: Annotated[str | None, typer.Option(help="Images of this split: test, or with --size validation.")] = None,
    size: Annotated[int | None, typer.Option(help="Crop photographs to the size x size pixels in their middle.")] = None,
    resize: Annotated[int | None, typer.Option(help="Their shorter side before that; size / 0.875 by default.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that decode photographs.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 100,
    mean: Annotated[tuple[float, float, float], typer.Option(help="Of the colours, 0 to 1, to normalise by.")] = IMAGENET_MEAN,
    std: Annotated[tuple[float, float, float], typer.Option(help="Likewise, the standard deviation.")] = IMAGENET_STD,
) -> None:
    """Top-1 accuracy of a dense or decomposed classifier on images of one size, or with --size on photographs."""
    if size is None:
        refuse(context, "resize", "workers", because="without --size images are taken whole")
    elif resize is not None and resize < size:
        raise RankPruneError(f"--resize {resize} leaves too little to cut --size {size} out of")
    network, normalize = build_model(model, checkpoint, artefact).float(), Normalize(mean, std)  # also of a file in half
    if torch.cuda.is_available():
        network.cuda()
    device = device_of(network)
    if size is None:
        images = load_images(data, split or "test")
        batches = eval_batches(images, batch, normalize, device)
    else:
        images = load_photographs(data, split or "validation")
        batches = centre_batches(images, PhotographConfig.at(size, resize, workers=workers), batch, normalize, device)
    first = next(batches)
    with undisturbed(network), torch.no_grad():
        told_apart = logits_of(network, first[0][:1]).shape[1]
    accuracy = top1(network, chain([first], batches))
    say(f"top-1 {accuracy:.2f} % of {len(images)} images")
    tell_untrained(model, checkpoint, artefact)
    if told_apart != len(images.classes):
        say(
            f"the network tells {told_apart} classes apart, and these images have {len(images.classes)}, numbered by what is "
            "there: if they are a part of its classes, their numbers are others"
        )


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
    say(f"{model} on {input}")
    say(str(count_cost(network, x)))
    if time:
        timing = measure(network, x)
        say(f"{timing.median_ms:.2f} ms (median of {timing.runs}, spread {timing.spread:.0%}, {timing.threads} threads)")
