"""rankprune train, and rankprune bench run: the recipes."""

import os
from pathlib import Path
from typing import Annotated

import typer

from rankprune.cli.console import TrainingBars, say, show_table
from rankprune.cli.options import Rule, SchemeName, refuse
from rankprune.errors import RankPruneError
from rankprune.recipes import experiment as experiments
from rankprune.recipes.data import images_of, place_of
from rankprune.recipes.networks import CHECKPOINT, IMAGENET, RUN, TIMM, TORCHVISION, WEIGHTS
from rankprune.recipes.photograph_batches import PhotographConfig
from rankprune.recipes.photographs import HUB
from rankprune.recipes.processes import first_here, joined
from rankprune.recipes.record import check_unused, finished, write
from rankprune.recipes.runner import run
from rankprune.recipes.schedule import TrainConfig
from rankprune.rules import parse_rule

METHODS = "dense, decompose, decompose+finetune, or TRP by the options below, which tables call ours, trp or trp+nu as you say."


def train(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="resnet20, 32, 44, 56 or 110; for photographs resnet18 or 50.")] = "resnet20",
    data: Annotated[
        str | None,
        typer.Option(help="CIFAR-10 files, parquet, an image folder, or hub:NAME; $RANKPRUNE_DATA if for small images."),
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="Pretrained weights to go on from: a file, torchvision:NAME or timm:NAME.")
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="Weights of a dense network to learn from, likewise; by default --start's. Several: one each."),
    ] = None,
    teacher_model: Annotated[str | None, typer.Option(help="What that is, if no network like --model: resnet56, say.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Weights of the dense network to compare with, likewise, or run:NAME beside --out.")
    ] = None,
    distill: Annotated[float, typer.Option(help="Weight of the teacher's answers against the labels, like 0.7.")] = 0.0,
    method: Annotated[str, typer.Option(help=METHODS)] = "ours",
    scheme: SchemeName = "spatial",
    rule: Rule = "Budget(macs=1/2.2)",
    every: Annotated[int, typer.Option(help="Optimizer steps between projections.")] = 20,
    nuclear: Annotated[float, typer.Option(help="Weight of the nuclear-norm term, for trp+nu.")] = 0.0,
    ramp: Annotated[
        float, typer.Option(help="Part of the training over which the rule is annealed; 0 for rules that are not.")
    ] = 0.5,
    freeze: Annotated[float, typer.Option(help="Part of the training after which ranks are kept, no less than --ramp.")] = 0.5,
    epochs: int = 10,
    batch: int = 128,
    lr: float = 0.05,
    weight_decay: float = 1e-4,
    seed: int = 0,
    checkpoint_steps: Annotated[
        int, typer.Option(help="Steps between checkpoints in an epoch; 0 for one after each epoch.")
    ] = 0,
    holdout: Annotated[int, typer.Option(help="Training images to test on instead of the test split.")] = 0,
    size: Annotated[int, typer.Option(help="Pixels a side of the crops, for photographs.")] = 224,
    workers: Annotated[int, typer.Option(help="Processes that decode photographs ahead; with 0 they are kept decoded.")] = 8,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    compile: Annotated[bool, typer.Option(help="Use torch.compile.")] = True,
    time_batch: Annotated[int, typer.Option(min=1, help="Images at once, where --rule goes by latency.")] = 1,
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoint, artefact and result.json; an interrupted run goes on.")
    ] = Path("runs/train"),
) -> None:
    """Train a ResNet with TRP, decompose it, and evaluate the decomposed model."""
    if model in IMAGENET and data is None:
        raise RankPruneError(f"{model} is trained on photographs: say with --data where they are")
    if model not in IMAGENET:
        refuse(context, "size", "workers", because=f"{model} is for small images, which are taken whole")
    by_clock = parse_rule(rule).metric == "latency"
    trp_only = ("every", "nuclear", "ramp", "freeze")
    training = ("epochs", "batch", "lr", "weight_decay", "distill", "precision", "compile")
    training += ("teacher", "teacher_model", "checkpoint_steps", "seed")
    if method == "dense":
        refuse(context, "scheme", "rule", *trp_only, because="--method dense decomposes nothing")
    elif method.startswith("decompose"):
        refuse(context, *trp_only, because=f"--method {method} trains without TRP")
    if method == "decompose":
        refuse(context, *training, because="--method decompose trains nothing")
    if method == "dense" or not by_clock:
        refuse(context, "time_batch", because="nothing goes by latency")
    sources = (data,) if data is not None and data.startswith(HUB) else ()
    experiment = experiments.Experiment(
        name=out.name,
        method=method,  # type: ignore[arg-type]
        model=model,
        dataset=_dataset(data),
        start=_weights(start),
        teacher=_teacher(teacher),
        teacher_model=teacher_model,
        reference=_weights(reference),
        batch=batch,
        holdout=holdout,
        training=TrainConfig(
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            distill=distill,
            precision=precision,  # type: ignore[arg-type]
            compile=compile,
            seed=seed,
            checkpoint_steps=checkpoint_steps,
        ),
        trp=experiments.TrpConfig(
            rule=rule,
            scheme=scheme,
            every=every,
            nuclear=nuclear,
            ramp=ramp,
            freeze=freeze,
            batch=time_batch if by_clock else None,
        ),
        photographs=PhotographConfig.at(size, sources=sources, workers=workers) if model in IMAGENET else None,
    )
    check_unused(experiment, out / "result.json")
    folders = experiments.Folders.from_environment(out.parent)
    if data is not None:
        folders = experiments.Folders(Path(data), Path(data), out.parent)
    _run(experiment, folders, out, "result")


def _teacher(sources: list[str] | None) -> str | tuple[str, ...] | None:
    """Where the weights of one teacher or several come from."""
    found = tuple(str(_weights(source)) for source in sources or ())
    return found if len(found) > 1 else next(iter(found), None)


def _weights(source: str | None) -> str | None:
    """Where they come from, a file by its whole path."""
    return source if source is None or source.startswith((RUN, TORCHVISION, TIMM)) else str(Path(source).resolve())


def _dataset(data: str | None) -> str:
    """What to call the images: after their folder, or as on the hub."""
    if data is None:
        data = str(place_of(experiments.Experiment.dataset, experiments.Folders.from_environment().data))
    return os.path.basename(data.removeprefix(HUB) if data.startswith(HUB) else os.path.abspath(data))


def bench_run(
    file: Annotated[Path, typer.Argument(help="An experiment, benchmarks/experiments/NAME.toml.")],
    seed: Annotated[int | None, typer.Option(help="Instead of the seed in the file.")] = None,
    results: Annotated[Path, typer.Option(help="Folder for NAME.json.")] = Path("benchmarks/results"),
    runs: Annotated[Path, typer.Option(help="Folder for checkpoints and artefacts.")] = Path("runs"),
    again: Annotated[bool, typer.Option("--again", help="Evaluate and time a finished run once more.")] = False,
) -> None:
    """Run one experiment, or the rest of an interrupted one, and write its JSON, unless that and its weights are there."""
    experiment = experiments.Experiment.read(file)
    experiment = experiment if seed is None else experiment.with_seed(seed)
    if not again and finished(experiment, path := results / f"{experiment.name}.json", runs):
        if first_here():
            say(f"result  {path}  (was there; --again evaluates and times it once more)")
        return
    needed = [runs / experiment.name / file for file in (CHECKPOINT, WEIGHTS)]  # the latter only when it has been judged
    if again and experiment.method != "decompose" and (missing := [str(file) for file in needed if not file.is_file()]):
        raise RankPruneError(f"--again evaluates a finished run: there is no {missing[0]!r}; it is trained without --again")
    _run(experiment, experiments.Folders.from_environment(runs, results), results, experiment.name)


def _run(experiment: experiments.Experiment, folders: experiments.Folders, out: Path, name: str) -> None:
    if first_here():
        out.mkdir(parents=True, exist_ok=True)  # what cannot be written shows before the training
    with joined() as processes, TrainingBars(experiment.training.epochs, shown=processes.first) as bars:
        if processes.first:
            where = f"{processes.size} processes, of which the first" if processes.size > 1 else "one process"
            say(f"{experiment.name}: {where} on {processes.device}, images of {images_of(experiment, folders.data)}")
        result = run(experiment, folders, bars.named(experiment.method) if processes.first else None, processes)
        if result is None:  # another process has it
            return
        path = write(result, out / f"{name}.json")
    dense = (result["macs_dense"], result["params_dense"])
    rows = [("dense", result["top1_dense"], *dense)] if "top1_dense" in result else []
    if result["method"] != "dense":
        rows.append(("before decomposition", result["top1_before_decomposition"], *dense))
        rows.append(("decomposed", result["top1"], result["macs"], result["params"]))
    show_table(
        f"{experiment.name}: {experiment.model} on {experiment.dataset}, {experiment.method}",
        ["network", "top-1 %", "MACs", "fewer", "params"],
        [(n, f"{acc:.2f}", f"{macs:,}", f"{result['macs_dense'] / macs:.2f}x", f"{params:,}") for n, acc, macs, params in rows],
    )
    say(f"result  {path}")
