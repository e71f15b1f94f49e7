"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from rankprune.errors import RankPruneError
from rankprune.rules import RULES
from rankprune.schemes import CHOICES

ModelSpec = Annotated[str, typer.Option("--model", help="Builder of the dense model, package.module:callable.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Its weights: .pt, .pth, .th, .bin or .safetensors.")]
Artefact = Annotated[Path | None, typer.Option(help="Folder of a decomposed model, instead of a checkpoint.")]
InputShape = Annotated[str, typer.Option("--input", help="Shape of one batch, like 1,3,224,224; int:1,128 for tokens.")]
SchemeName = Annotated[str, typer.Option(help=f"{', '.join(CHOICES[:-1])} or {CHOICES[-1]}.")]
Rule = Annotated[str, typer.Option(help=f"Rank rule, like Budget(macs=0.4) or Energy(keep=0.98): {', '.join(RULES)}.")]
Include = Annotated[list[str] | None, typer.Option(help="Pattern of layers to take; repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave dense; repeatable.")]
RoundTo = Annotated[int, typer.Option(help="Round ranks up to a multiple.")]


def refuse(context: typer.Context, *names: str, because: str) -> None:
    """Make sure that none of these options is on the command line, where they would do nothing.

    Raises:
        RankPruneError: naming those that are.
    """
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [f"--{name.replace('_', '-')}" for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if given:
        raise RankPruneError(f"{' and '.join(given)} would do nothing: {because}")
