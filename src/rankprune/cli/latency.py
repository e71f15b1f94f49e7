"""rankprune bench latency."""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rankprune.backends import BACKENDS, backend_named
from rankprune.cli.console import say, show_table
from rankprune.cli.options import Checkpoint, InputShape, ModelSpec, SchemeName, refuse
from rankprune.cli.target import build_model, dtype_of, example_input
from rankprune.comparison import Comparison, CurvePoint, compare, installed_backends, layer_curve
from rankprune.cost import count
from rankprune.decompose import decompose
from rankprune.errors import RankPruneError
from rankprune.files import check_folder
from rankprune.latency import Setting
from rankprune.latency.cache import NOISY
from rankprune.plan import Plan
from rankprune.planner import make_plan
from rankprune.recipes.record import provenance, write
from rankprune.report.plots import plot_layer, require_matplotlib
from rankprune.rules import Budget, RankRule, parse_rule

DENSE = "dense"
SEED = 0
"""Of the weights of models that start from random ones."""


def bench_latency(
    context: typer.Context,
    model: ModelSpec,
    input: InputShape,
    checkpoint: Checkpoint = None,
    artefact: Annotated[Path | None, typer.Option(help="Folder of a decomposed model, to time as well.")] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="Decompose the dense model by this rank rule; repeatable.",
            show_default="Budget(macs=0.5), or none with --artefact",
        ),
    ] = None,
    scheme: SchemeName = "auto",
    backend: Annotated[
        list[str] | None,
        typer.Option(help=f"Backend to measure on, repeatable: {', '.join(BACKENDS)}.", show_default="all installed"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads to run on, also for rules that name no number.", show_default="as torch"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="How often to time each network on each backend.")] = 25,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
    layer: Annotated[
        str | None, typer.Option(help="Also time this layer, by its name in the plan, over its ranks, on the first backend.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curve of --layer into this .png or .svg.")] = None,
) -> None:
    """Time a network dense and decomposed, on every installed backend, and set it beside the MACs.

    Times are medians in milliseconds for one call on the input; spread is (third - first quartile) / median.
    """
    if plot is not None and layer is None:
        raise RankPruneError(f"--plot {str(plot)!r} draws the curve of one layer: name it with --layer")
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise RankPruneError(f"--plot {str(plot)!r}: give a file that ends in .png or .svg")
    if plot is not None:
        check_folder(plot)
        require_matplotlib()
    if artefact is not None and not rule and layer is None:
        refuse(context, "scheme", because="--artefact is decomposed already; give a --rule or a --layer as well")
    for name in backend or ():
        backend_named(name).require()
    texts = rule or ([] if artefact else ["Budget(macs=0.5)"])
    rules = {text: _with_threads(parse_rule(text), threads) for text in texts}
    backends = list(dict.fromkeys(backend or installed_backends()))
    torch.manual_seed(SEED)
    dense = build_model(model, checkpoint)
    x = example_input(input, dense)
    networks = {DENSE: dense}
    if artefact is not None:
        networks[f"artefact {artefact}"] = build_model(model, artefact=artefact).to(dtype_of(dense))
    curve = [] if layer is None else layer_curve(dense, x, layer, backends[0], scheme=scheme, threads=threads)
    if layer is not None:
        _show_curve(f"{layer} of {model.split(':')[-1]}, {backends[0]}", curve, plot)
    plans: dict[str, Plan] = {}
    planning_s: dict[str, float] = {}
    for text, parsed in rules.items():
        began = time.perf_counter()
        plans[text] = make_plan(dense, x, scheme=scheme, rule=parsed)
        planning_s[text] = round(time.perf_counter() - began, 1)
        networks[text] = decompose(dense, plans[text])
    found = compare(networks, x, backends, threads=threads, rounds=rounds)
    if not found.timings:
        raise RankPruneError(f"no backend could be measured: {'; '.join(f'{n}: {why}' for n, why in found.failed.items())}")
    predicted = _predictions(rules, plans)
    rows = _rows(found, predicted, {name: count(network, x).macs for name, network in networks.items()})
    _show_rows(f"{model} on {input}", rows)
    measured = {(r["network"], r["backend"], r["threads"]) for r in rows}
    for (text, name, used), times in predicted.items():
        if (text, name, used) not in measured:
            say(f"{text}: predicted {times:.2f}x in {name} with {used} threads, which is not measured here")
    for name, reason in found.failed.items():
        say(f"{name}: {reason}")
    for name in [name for name in BACKENDS if name not in backends and backend is None]:
        say(f"{name} is not installed")
    if any(r["spread"] > NOISY for r in rows):
        say(f"times vary by more than {NOISY:.0%}: stop what else runs on this machine and try again")
    if out is not None:
        setting = {"model": model, "input": input, "scheme": scheme, "rules": texts, "rounds": rounds, "threads": threads}
        settings = {name: asdict(Setting.of(dense, name, threads)) for name in dict.fromkeys(t.backend for t in found.timings)}
        ranks = {text: {n: [e.scheme, e.rank] for n, e in plan.decomposed.items()} for text, plan in plans.items()}
        result = {"benchmark": "latency", "config": setting, "seed": SEED, "settings": settings, "rows": rows, "plans": ranks}
        result |= {"planning_s": planning_s, "failed": dict(found.failed)}
        result |= {"layer": layer, "curve": [asdict(p) for p in curve]} if curve else {}
        say(f"result  {write({**result, **provenance()}, out)}")


def _predictions(rules: Mapping[str, RankRule], plans: Mapping[str, Plan]) -> dict[tuple[str, str, int], float]:
    """By rule, backend and threads: how many times faster a budget of latency expects the network to be."""
    found = {}
    for text, rule in rules.items():
        ms, dense = plans[text].ms, plans[text].ms_dense
        if ms and dense:
            found[text, rule.backend, rule.threads or backend_named(rule.backend).threads] = dense / ms
    return found


def _rows(found: Comparison, predicted: Mapping[tuple[str, str, int], float], macs: Mapping[str, int]) -> list[dict[str, Any]]:
    base = {t.backend: t.ms for t in found.timings if t.network == DENSE}
    return [
        {
            **asdict(t),
            "speedup": base[t.backend] / t.ms,
            "macs": macs[t.network],
            "macs_speedup": macs[DENSE] / macs[t.network],
            "predicted_speedup": predicted.get((t.network, t.backend, t.threads)),
        }
        for t in found.timings
    ]


def _with_threads(rule: RankRule, threads: int | None) -> RankRule:
    """A budget of latency that names no number of threads is for as many as are measured with."""
    if isinstance(rule, Budget) and rule.latency is not None and rule.threads is None:
        return replace(rule, threads=threads)
    return rule


def _show_curve(title: str, curve: list[CurvePoint], plot: Path | None) -> None:
    rows = [(p.scheme, str(p.rank), f"{p.ms:.2f}", f"{p.macs:.2f}") for p in curve]
    show_table(f"{title}, in parts of the dense layer", ["scheme", "rank", "time", "MACs"], rows)
    if plot is not None:
        plot_layer(plot, curve, title)
        say(f"plot    {plot}")


def _show_rows(title: str, rows: list[dict[str, Any]]) -> None:
    show_table(
        title,
        ["network", "backend", "threads", "ms", "spread", "faster", "predicted", "fewer MACs"],
        [
            (
                r["network"],
                r["backend"],
                str(r["threads"]),
                f"{r['ms']:.2f}",
                f"{r['spread']:.0%}",
                f"{r['speedup']:.2f}x",
                "" if r["predicted_speedup"] is None else f"{r['predicted_speedup']:.2f}x",
                f"{r['macs_speedup']:.2f}x",
            )
            for r in rows
        ],
    )
