"""rankprune bench latency."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rankprune.backends import BACKENDS
from rankprune.budget import Budget
from rankprune.cli.console import say, show_table
from rankprune.cli.options import Artefact, Checkpoint, InputShape, ModelSpec, SchemeName
from rankprune.cli.target import build_model, example_input
from rankprune.comparison import compare, installed_backends, layer_curve
from rankprune.cost import count
from rankprune.decompose import decompose
from rankprune.latency.cache import NOISY
from rankprune.planner import make_plan
from rankprune.recipes.runner import provenance, write
from rankprune.report.plots import plot_layer
from rankprune.rules import parse_rule

DENSE = "dense"


def bench_latency(
    model: ModelSpec,
    input: InputShape,
    checkpoint: Checkpoint = None,
    artefact: Artefact = None,
    rule: Annotated[list[str] | None, typer.Option(help="Decompose by this rank rule; repeatable.")] = None,
    scheme: SchemeName = "auto",
    backend: Annotated[list[str] | None, typer.Option(help="Backend to measure on, repeatable; default all installed.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; default as many as torch uses.")] = None,
    rounds: Annotated[int, typer.Option(help="How often to time each network.")] = 25,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
    layer: Annotated[str | None, typer.Option(help="Also time this layer over its ranks, on the first backend.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the layer's curve into this .png or .svg.")] = None,
) -> None:
    """Time a network dense and decomposed, on every installed backend, and set it beside the MACs."""
    torch.manual_seed(0)  # for models of random weights
    dense = build_model(model, checkpoint)
    x = example_input(input, dense)
    networks, predicted, plans = {DENSE: dense}, {}, {}
    rules = rule or ([] if artefact else ["Budget(macs=0.5)"])
    for text in rules:
        parsed = parse_rule(text)
        plan = make_plan(dense, x, scheme=scheme, rule=parsed)
        networks[text] = decompose(dense, plan)
        plans[text] = {name: [e.scheme, e.rank] for name, e in plan.decomposed.items()}
        if isinstance(parsed, Budget) and plan.ms and plan.ms_dense:
            predicted[text, parsed.backend] = plan.ms_dense / plan.ms
    if artefact is not None:
        networks[str(artefact)] = build_model(model, artefact=artefact)
    macs = {name: count(network, x).macs for name, network in networks.items()}
    backends = backend or installed_backends()
    found = compare(networks, x, backends, threads=threads, rounds=rounds)
    base = {t.backend: t.ms for t in found.timings if t.network == DENSE}
    rows: list[dict[str, Any]] = [
        {
            **asdict(t),
            "speedup": base[t.backend] / t.ms,
            "macs": macs[t.network],
            "macs_speedup": macs[DENSE] / macs[t.network],
            "predicted_speedup": predicted.get((t.network, t.backend)),
        }
        for t in found.timings
    ]
    show_table(
        f"{model} on {input}, {threads or torch.get_num_threads()} threads",
        ["network", "backend", "ms", "spread", "faster", "predicted", "fewer MACs"],
        [
            (
                r["network"],
                r["backend"],
                f"{r['ms']:.2f}",
                f"{r['spread']:.0%}",
                f"{r['speedup']:.2f}x",
                "" if r["predicted_speedup"] is None else f"{r['predicted_speedup']:.2f}x",
                f"{r['macs_speedup']:.2f}x",
            )
            for r in rows
        ],
    )
    for name, reason in found.failed.items():
        say(f"{name}: {reason}")
    for name in [name for name in BACKENDS if name not in backends and backend is None]:
        say(f"{name} is not installed")
    if any(r["spread"] > NOISY for r in rows):
        say(f"times vary by more than {NOISY:.0%}: stop what else runs on this machine and try again")
    points = [] if layer is None else layer_curve(dense, x, layer, backends[0], scheme=scheme, threads=threads)
    if layer is not None and plot is not None:
        plot_layer(plot, points, f"{layer} of {model.split(':')[-1]}, {backends[0]}")
        say(f"plot    {plot}")
    if out is not None:
        setting = {"model": model, "input": input, "scheme": scheme, "rules": rules, "rounds": rounds, "threads": threads}
        result = {"benchmark": "latency", "config": setting, "rows": rows, "plans": plans, "failed": dict(found.failed)}
        result |= {"layer": layer, "curve": [asdict(p) for p in points]} if points else {}
        say(f"result  {write({**result, **provenance()}, out)}")
