"""The commands. Each translates its options, calls the library, and prints what came of it."""

from pathlib import Path
from typing import Annotated

import typer

from rankprune.checkpoint import load_plan, save
from rankprune.cli.console import TrainingBars, say, show_table
from rankprune.cli.target import build_model, example_input
from rankprune.cost import count as count_cost
from rankprune.cost import measure_together
from rankprune.decompose import decompose as decompose_model
from rankprune.errors import RankPruneError
from rankprune.export import export_onnx
from rankprune.plan import Plan
from rankprune.planner import make_plan
from rankprune.projection import planned_spectra
from rankprune.recipes import experiment as experiments
from rankprune.recipes import runner
from rankprune.recipes.batches import Normalize, eval_batches
from rankprune.recipes.digits import demonstrate
from rankprune.recipes.evaluation import top1
from rankprune.recipes.images import IMAGENET_MEAN, IMAGENET_STD, load_images
from rankprune.recipes.processes import joined
from rankprune.recipes.training import TrainConfig
from rankprune.report.plots import plot_results, plot_training
from rankprune.report.tables import markdown_table, read_results, replace_between_marks
from rankprune.rules import parse_rule

app = typer.Typer(help="Train networks low-rank, decompose them exactly.", no_args_is_help=True, add_completion=False)
bench = typer.Typer(help="Benchmarks: one file a run, one JSON a result.", no_args_is_help=True)
app.add_typer(bench, name="bench")

ModelSpec = Annotated[str, typer.Option("--model", help="Builder of the dense model, package.module:callable.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Its weights: .pt, .pth, .th or .safetensors.")]
Artefact = Annotated[Path | None, typer.Option(help="Folder of a decomposed model, instead of a checkpoint.")]
InputShape = Annotated[str, typer.Option("--input", help="Shape of one batch, like 1,3,224,224; int:1,128 for tokens.")]
SchemeName = Annotated[str, typer.Option(help="channel, spatial, decoupled or auto.")]
Rule = Annotated[str, typer.Option(help="Rank rule: Budget(macs=0.4), Energy(keep=0.98), ...")]
Include = Annotated[list[str] | None, typer.Option(help="Pattern of layers to take; repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave dense; repeatable.")]
RoundTo = Annotated[int, typer.Option(help="Round ranks up to a multiple.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("rankprune-demo"), epochs: int = 15, seed: int = 0
) -> None:
    """Make a small network for handwritten digits smaller, three ways with the same budget."""
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


@app.command()
def train(
    model: Annotated[str, typer.Option(help="resnet20, 32, 44, 56 or 110.")] = "resnet20",
    data: Annotated[
        Path | None, typer.Option(help="CIFAR-10 files, parquet or an image folder; default $RANKPRUNE_DATA.")
    ] = None,
    start: Annotated[Path | None, typer.Option(help="Pretrained weights to go on from.")] = None,
    method: Annotated[str, typer.Option(help="trp, trp+nu, dense or decompose.")] = "trp",
    scheme: SchemeName = "spatial",
    rule: Rule = "Budget(macs=1/2.2)",
    every: Annotated[int, typer.Option(help="Optimizer steps between projections.")] = 20,
    nuclear: Annotated[float, typer.Option(help="Weight of the nuclear-norm term, for trp+nu.")] = 0.0,
    ramp: Annotated[float, typer.Option(help="Part of the training over which the rule is annealed.")] = 0.5,
    freeze: Annotated[float, typer.Option(help="Part of the training after which ranks are kept.")] = 0.5,
    epochs: int = 10,
    batch: int = 128,
    lr: float = 0.05,
    weight_decay: float = 1e-4,
    seed: int = 0,
    holdout: Annotated[int, typer.Option(help="Training images to test on instead of the test split.")] = 0,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    compile: Annotated[bool, typer.Option(help="Use torch.compile.")] = True,
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoint, artefact and result.json; an interrupted run goes on.")
    ] = Path("runs/train"),
) -> None:
    """Train a CIFAR ResNet with TRP, decompose it, and evaluate the decomposed model."""
    experiment = experiments.Experiment(
        name=out.name,
        method=method,  # type: ignore[arg-type]
        model=model,
        start=None if start is None else str(start.resolve()),
        batch=batch,
        holdout=holdout,
        training=TrainConfig(
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            precision=precision,  # type: ignore[arg-type]
            compile=compile,
            seed=seed,
        ),
        trp=experiments.TrpConfig(rule=rule, scheme=scheme, every=every, nuclear=nuclear, ramp=ramp, freeze=freeze),
    )
    folders = experiments.Folders.from_environment(out.parent)
    if data is not None:
        folders = experiments.Folders(data, data, out.parent)
    _run(experiment, folders, out, "result")


@bench.command("run")
def bench_run(
    file: Annotated[Path, typer.Argument(help="An experiment, benchmarks/experiments/NAME.toml.")],
    seed: Annotated[int | None, typer.Option(help="Instead of the seed in the file.")] = None,
    results: Annotated[Path, typer.Option(help="Folder for NAME.json.")] = Path("benchmarks/results"),
    runs: Annotated[Path, typer.Option(help="Folder for checkpoints and artefacts.")] = Path("runs"),
) -> None:
    """Run one experiment, or the rest of an interrupted one, and write its JSON."""
    experiment = experiments.Experiment.read(file)
    experiment = experiment if seed is None else experiment.with_seed(seed)
    _run(experiment, experiments.Folders.from_environment(runs), results, experiment.name)


def _run(experiment: experiments.Experiment, folders: experiments.Folders, out: Path, name: str) -> None:
    with joined() as processes, TrainingBars(experiment.training.epochs if processes.first else 0) as bars:
        result = runner.run(experiment, folders, bars.named(experiment.method) if processes.first else None, processes)
    if result is None:  # another process has it
        return
    path = runner.write(result, out / f"{name}.json")
    rows = [
        (
            "dense",
            result.get("top1_dense", result.get("top1_before_decomposition")),
            result["macs_dense"],
            result["params_dense"],
        )
    ]
    if "top1" in result:
        rows = [("before decomposition", *rows[0][1:]), ("decomposed", result["top1"], result["macs"], result["params"])]
    show_table(
        f"{experiment.name}: {experiment.model} on {experiment.dataset}, {experiment.method}",
        ["network", "top-1 %", "MACs", "fewer", "params"],
        [(n, f"{acc:.2f}", f"{macs:,}", f"{result['macs_dense'] / macs:.2f}x", f"{params:,}") for n, acc, macs, params in rows],
    )
    say(f"result  {path}")


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("benchmarks/results"),
    into: Annotated[Path | None, typer.Option(help="Write the table between the marks in this Markdown file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw accuracy, spectra and ranks into this folder.")] = None,
) -> None:
    """A Markdown table of all results, and pictures of them."""
    found = read_results(results)
    table = markdown_table(found)
    if into is None:
        say(table)
    else:
        into.write_text(replace_between_marks(into.read_text(), table))
        say(f"table  {into}")
    if plots is not None:
        for file in plot_results(plots, found):
            say(f"plot   {file}")


@app.command()
def plan(
    model: ModelSpec,
    input: InputShape,
    checkpoint: Checkpoint = None,
    scheme: SchemeName = "auto",
    rule: Rule = "Budget(macs=0.5)",
    include: Include = None,
    exclude: Exclude = None,
    round_to: RoundTo = 1,
    out: Annotated[Path | None, typer.Option(help="Write the plan to this JSON file.")] = None,
) -> None:
    """Show which layers would be decomposed, at which rank, and what that saves."""
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
    if out is not None:
        made.save(out)
        say(f"plan  {out}")


@app.command()
def decompose(
    model: ModelSpec,
    out: Annotated[Path, typer.Option(help="Folder for the artefact.")],
    checkpoint: Checkpoint = None,
    plan: Annotated[Path | None, typer.Option(help="A plan file; without it, one is made as by `rankprune plan`.")] = None,
    input: Annotated[str | None, typer.Option("--input", help="Shape of one batch; not needed with --plan.")] = None,
    scheme: SchemeName = "auto",
    rule: Rule = "Budget(macs=0.5)",
    include: Include = None,
    exclude: Exclude = None,
    round_to: RoundTo = 1,
) -> None:
    """Decompose a model and write the artefact."""
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
    say(f"artefact  {out}")


@app.command()
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


@app.command()
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


@app.command()
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
