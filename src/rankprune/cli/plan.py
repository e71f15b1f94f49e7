"""rankprune plan and rankprune decompose."""

from pathlib import Path
from typing import Annotated

import typer

from rankprune.checkpoint import save
from rankprune.cli.console import say
from rankprune.cli.options import Checkpoint, Exclude, Include, InputShape, ModelSpec, RoundTo, Rule, SchemeName, refuse
from rankprune.cli.target import build_model, example_input, tell_untrained
from rankprune.decompose import decompose as decompose_model
from rankprune.errors import RankPruneError
from rankprune.files import check_folder
from rankprune.plan import Plan
from rankprune.planner import make_plan
from rankprune.rules import parse_rule


def plan(
    model: ModelSpec,
    input: InputShape,
    checkpoint: Checkpoint = None,
    scheme: SchemeName = "spatial",
    rule: Rule = "Budget(macs=0.5)",
    include: Include = None,
    exclude: Exclude = None,
    round_to: RoundTo = 1,
    out: Annotated[Path | None, typer.Option(help="Write the plan to this JSON file.")] = None,
) -> None:
    """Show which layers would be decomposed, at which rank, and what that saves."""
    if out is not None:
        check_folder(out)
    dense = build_model(model, checkpoint)
    made = make_plan(
        dense,
        example_input(input, dense),
        scheme=scheme,
        rule=parse_rule(rule),
        include=include,
        exclude=exclude or (),
        round_to=round_to,
    )
    say(str(made))
    tell_untrained(model, checkpoint)
    if out is not None:
        made.save(out)
        say(f"plan  {out}")


def decompose(
    context: typer.Context,
    model: ModelSpec,
    out: Annotated[Path, typer.Option(help="Folder for the artefact.")],
    checkpoint: Checkpoint = None,
    plan: Annotated[Path | None, typer.Option(help="A plan file; without it, one is made as by `rankprune plan`.")] = None,
    input: Annotated[str | None, typer.Option("--input", help="Shape of one batch, for rules by MACs or time.")] = None,
    scheme: SchemeName = "spatial",
    rule: Rule = "Budget(macs=0.5)",
    include: Include = None,
    exclude: Exclude = None,
    round_to: RoundTo = 1,
) -> None:
    """Decompose a model and write the artefact."""
    if plan is not None:
        choices = ("input", "scheme", "rule", "include", "exclude", "round_to")
        refuse(context, *choices, because="--plan says already what to decompose, and at which rank")
    elif input is None and parse_rule(rule).needs_inputs:
        raise RankPruneError(f"{rule} counts MACs or time: give the shape of one batch, like --input 1,3,224,224")
    dense = build_model(model, checkpoint)
    x = None if input is None else example_input(input, dense)
    made = (
        Plan.load(plan)
        if plan is not None
        else make_plan(
            dense, x, scheme=scheme, rule=parse_rule(rule), include=include, exclude=exclude or (), round_to=round_to
        )
    )
    save(out, decompose_model(dense, made), made)
    say(str(made))
    tell_untrained(model, checkpoint)
    say(f"artefact  {out}")
