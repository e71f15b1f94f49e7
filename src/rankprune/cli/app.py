"""The commands, a file each or two that belong together. They translate options, call the library, print what came of it."""

from typing import Annotated

import typer

from rankprune.cli.console import say
from rankprune.cli.demo import demo
from rankprune.cli.export import export
from rankprune.cli.inspect import count, evaluate
from rankprune.cli.latency import bench_latency
from rankprune.cli.plan import decompose, plan
from rankprune.cli.report import report
from rankprune.cli.train import bench_run, train
from rankprune.version import VERSION

app = typer.Typer(no_args_is_help=True, add_completion=False)


def _tell_version(asked: bool) -> None:
    if asked:
        say(VERSION)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Say it and end.")] = False,
) -> None:
    """Train networks low-rank, decompose them exactly."""


for command in (demo, train, report, plan, decompose, evaluate, count, export):
    app.command()(command)

bench = typer.Typer(help="Benchmarks: one file a run, one JSON a result.", no_args_is_help=True)
bench.command("run")(bench_run)
bench.command("latency")(bench_latency)
app.add_typer(bench, name="bench")
