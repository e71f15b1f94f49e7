"""rankprune export."""

from pathlib import Path
from typing import Annotated

import typer

from rankprune.cli.console import say
from rankprune.cli.options import Artefact, Checkpoint, InputShape, ModelSpec
from rankprune.cli.target import build_model, example_input, tell_untrained
from rankprune.export import FILE_BACKENDS
from rankprune.export import export as export_model

_FILES = ", ".join(f"{suffix} ({backend.name})" for suffix, backend in FILE_BACKENDS.items())
_CLOSED = ", ".join(suffix for suffix, backend in FILE_BACKENDS.items() if not backend.opens_batch)


def export(
    model: ModelSpec,
    input: InputShape,
    out: Annotated[
        Path,
        typer.Option(help=f"The file to write, of one of these kinds: {_FILES}."),
    ],
    checkpoint: Checkpoint = None,
    artefact: Artefact = None,
    dynamic_batch: Annotated[
        bool | None, typer.Option(help="Leave the batch size open, or not.", show_default=f"open, but for {_CLOSED}")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference from PyTorch that passes, in parts of the largest output.")
    ] = 1e-4,
) -> None:
    """Export a dense or decomposed model for another runtime, run the file there, and check that it computes the same."""
    network = build_model(model, checkpoint, artefact)
    x = example_input(input, network)
    difference = export_model(network, x, out, dynamic_batch=dynamic_batch, tolerance=tolerance)
    say(f"{out}  (largest difference from PyTorch {difference:.1e} of the largest output)")
    tell_untrained(model, checkpoint, artefact)
