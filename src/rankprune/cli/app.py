"""The commands, a file each or two that belong together. They translate options, call the library, print what came of it."""

import typer

from rankprune.cli.demo import demo
from rankprune.cli.export import export
from rankprune.cli.inspect import count, evaluate
from rankprune.cli.latency import bench_latency
from rankprune.cli.plan import decompose, plan
from rankprune.cli.report import report
from rankprune.cli.train import bench_run, train

app = typer.Typer(help="Train networks low-rank, decompose them exactly.", no_args_is_help=True, add_completion=False)
for command in (demo, train, report, plan, decompose, evaluate, count, export):
    app.command()(command)

bench = typer.Typer(help="Benchmarks: one file a run, one JSON a result.", no_args_is_help=True)
bench.command("run")(bench_run)
bench.command("latency")(bench_latency)
app.add_typer(bench, name="bench")
