"""rankprune export."""

from pathlib import Path
from typing import Annotated

import typer

from rankprune.checkpoint import load_plan
from rankprune.cli.console import say
from rankprune.cli.options import Artefact, Checkpoint, InputShape, ModelSpec
from rankprune.cli.target import build_model, example_input
from rankprune.errors import RankPruneError
from rankprune.export import export_onnx


def export(
    model: ModelSpec,
    input: InputShape,
    out: Annotated[Path, typer.Option(help="The .onnx file to write.")],
    checkpoint: Checkpoint = None,
    artefact: Artefact = None,
    dynamic_batch: Annotated[bool, typer.Option(help="Leave the batch size open.")] = True,
) -> None:
    """Export a dense or decomposed model to ONNX and check that it computes the same."""
    if out.suffix != ".onnx":
        raise RankPruneError(f"--out {str(out)!r}: give a file that ends in .onnx")
    network = build_model(model, checkpoint, artefact)
    difference = export_onnx(network, example_input(input, network), out, dynamic_batch=dynamic_batch)
    say(f"{out}  ({out.stat().st_size:,} bytes, largest difference from PyTorch {difference:.1e})")
    if artefact is not None:
        say(f"{len(load_plan(artefact).decomposed)} layers decomposed")
