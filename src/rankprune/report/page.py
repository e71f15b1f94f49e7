"""One HTML page of all runs. It loads nothing, runs no script, and is the same for the same results."""

import base64
import hashlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from xml.etree.ElementTree import Element

from rankprune.report import pictures, tables
from rankprune.report.markup import element, html
from rankprune.report.names import drawn_together, epochs_among, label, method, task, told_apart
from rankprune.report.pictures import Point
from rankprune.report.results import (
    Result,
    between_spectra,
    dense_networks,
    full_ranks,
    in_order,
    is_timed,
    machine,
    mean_of,
    plan_of,
    seeds_together,
    without_seed,
)
from rankprune.report.tables import Table
from rankprune.version import VERSION

SHAPES = {"spatial": "circle", "channel": "square", "decoupled": "triangle", "auto": "diamond"}
COLOURS = 8
"""How many the style sheet has; the first is that of dense networks."""


def page(results: Sequence[Result]) -> str:
    """The page as HTML: all runs side by side, then each by itself."""
    results = in_order(results)
    title = ", ".join(dict.fromkeys(f"{r['model']} on {task(r)}" for r in results))
    about = results[0]["name"] if len(results) == 1 else f"{len(results)} runs"
    epochs = epochs_among(results)
    runs = [_run(i, r, epochs(r)) for i, r in enumerate(results, 1)]
    links = [
        element("li", element("a", r["name"], href=f"#run-{i}"), f" {_in_short(r, epochs(r))}")
        for i, r in enumerate(results, 1)
    ]
    nav = element("nav", element("h2", "Runs"), element("ol", links))
    body = element(
        "body",
        element("header", element("h1", title), element("p", about)),
        element("main", _side_by_side(results), [nav] if len(runs) > 1 else [], runs),
        element("footer", element("p", f"Written by rankprune {VERSION}.")),
    )
    return html(element("html", _head(f"{title} · rankprune"), body, lang="en"))


def _head(title: str) -> Element:
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("link", rel="icon", href="data:,"),  # otherwise browsers ask the server for one
        element("style", style),
    )


def _side_by_side(results: Sequence[Result]) -> Element:
    overview = tables.overview(results)
    parts = [_scrolled(overview[0])] if len(overview) == 1 else [_titled(table) for table in overview]
    for title, together in drawn_together(results):
        parts += _accuracy(title, together)
    if len(results) > 1:
        for table in tables.ranks_together(results):
            parts.append(_titled(table))
    return element("section", element("h2", "Results"), parts, aria_label="results")


def _accuracy(title: str, results: Sequence[Result]) -> list[Element]:
    look_of, name_of = told_apart(results, method), told_apart(results)
    looks = dict.fromkeys(look_of(r) for r in results if r["method"] != "dense")
    colours = {look: 1 + i % (COLOURS - 1) for i, look in enumerate(looks)}
    by_macs: list[Point] = []
    by_ms: list[Point] = []
    legend: dict[str, tuple[int, str]] = {}
    for group in seeds_together(results):
        r, tops = mean_of(group), [g["top1"] for g in group]
        top, dense = sum(tops) / len(tops), r["method"] == "dense"
        colour, shape = (0, "bar") if dense else (colours[look_of(r)], SHAPES.get(r["scheme"], "cross"))
        legend["dense" if dense else name_of(r)] = colour, shape
        seeds = f", mean of {len(group)} seeds, {min(tops):.2f} to {max(tops):.2f}" if len(group) > 1 else ""
        said = f"{r['name']}: {top:.2f} %{seeds}"
        share = 100 * r["macs"] / r["macs_dense"]
        by_macs.append(Point(share, top, min(tops), max(tops), colour, shape, f"{said}, {share:.1f} % of the MACs"))
        if is_timed(r) and not dense:
            share, clock = 100 * r["ms"] / r["ms_dense"], f"{r['ms']:.1f} of {r['ms_dense']:.1f} {tables.timed_on(r)}"
            clock += f", {where}" if (where := machine(r)) else ""
            by_ms.append(Point(share, top, min(tops), max(tops), colour, shape, f"{said}, {clock}"))
    there = {without_seed(r["name"]) for r in results if r["method"] == "dense"}
    for name, tops in dense_networks(results).items():
        top = sum(tops) / len(tops)
        mark = Point(100, top, min(tops), max(tops), 0, "bar", f"{name}: {top:.2f} %")
        if name not in there:
            by_macs.append(mark)
            legend["dense"] = 0, "bar"
        if by_ms:
            by_ms.append(mark)
    axis = "top-1 accuracy, %"
    said = f"Accuracy against MACs of {len(by_macs)} networks"
    picture = pictures.scatter(by_macs, "MACs left, % of dense", axis, said, 100, whole=(0, 100))
    cards = [_card(f"Accuracy against MACs, {title}", picture)]
    if by_ms:
        picture = pictures.scatter(by_ms, "ms left, % of dense", axis, f"Accuracy against ms of {len(by_ms)} networks", 100)
        cards.append(_card(f"Accuracy against ms, {title}", picture))
    entries = [element("li", pictures.swatch(*look), name) for name, look in legend.items()]
    note = "Milliseconds are against the dense network measured in turn, for a machine's speed changes from run to run."
    return [
        element("div", cards, class_="cards"),
        element("ul", entries, class_="legend"),
        *([element("p", note, class_="note")] if by_ms else []),
    ]


def _run(number: int, r: Result, epochs: str) -> Element:
    commit = f"commit {r['commit']}" if r.get("commit") else ""
    trained = f"{epochs} epochs" if epochs else "not trained"
    facts = [r["model"], task(r), label(r), trained, f"seed {r.get('seed')}", r.get("date"), commit, machine(r)]
    parts = [
        element("h2", r["name"], id=f"run-{number}"),
        element("ul", (element("li", str(fact)) for fact in facts if fact), class_="facts"),
        element("div", _tiles(r), class_="tiles"),
        element("div", _curves(r), class_="cards"),
    ]
    if r["method"] == "dense":
        parts.append(element("p", "This network was left dense, so it has no ranks.", class_="note"))
    else:
        beside = [_titled(table) for table in (tables.skipped(r), tables.latency(r)) if table.rows]
        parts += [*_spectra(r), element("div", beside, class_="cards"), _absent(r), _folded("All figures", tables.figures(r))]
    return element("section", parts, _folded("Config", tables.config(r)), class_="run")


def _in_short(r: Result, epochs: str) -> str:
    return f"{label(r)}{f', {epochs} epochs' if epochs else ''}, {r['top1']:.2f} %"


def _absent(r: Result) -> Element:
    """What this result has no section on, and why."""
    reasons: dict[str, list[str]] = {}
    for table in tables.run_tables(r):
        if not table.rows:
            reasons.setdefault(table.note, []).append(table.title)
    notes = [element("p", element("b", f"{', '.join(names)}. "), why, class_="note") for why, names in reasons.items()]
    return element("div", notes)


def _tiles(r: Result) -> list[Element]:
    """The few figures that a reader wants first."""

    def tile(what: str, value: str, more: str = "") -> Element:
        note = [element("span", more, class_="more")] if more else []
        return element("div", element("span", what, class_="what"), element("span", value, class_="value"), note)

    if r["method"] == "dense":
        return [tile(*row) for row in tables.figures(r).rows]
    drop = f"{r['top1_dense']:.2f} dense" if "top1_dense" in r else f"{r['top1_before_decomposition']:.2f} before decomposition"
    tiles = [
        tile("top-1", f"{r['top1']:.2f} %", drop),
        tile("MACs", f"{tables.times(r['macs_dense'], r['macs'])} fewer", f"{r['macs']:,} of {r['macs_dense']:,}"),
        tile("params", f"{tables.times(r['params_dense'], r['params'])} fewer", f"{r['params']:,} of {r['params_dense']:,}"),
    ]
    if is_timed(r):
        fast, slow = sorted((r["ms_dense"], r["ms"]))
        change = f"{tables.times(slow, fast)} {'faster' if r['ms'] == fast else 'slower'}"
        tiles.append(
            tile(
                tables.timed_on(r),
                change,
                f"{r['ms']:.1f}, dense {r['ms_dense']:.1f}",
            )
        )
    return tiles


def _curves(r: Result) -> list[Element]:
    """What changed over the training, and what each layer costs."""
    cards = []
    if losses := [(entry["epoch"] + 1, entry["loss"]) for entry in r.get("log", ()) if "loss" in entry]:
        said = f"Training loss over {len(losses)} epochs, from {losses[0][1]:.3g} to {losses[-1][1]:.3g}"
        if len(losses) > 1:
            cards.append(_card("Training loss", pictures.curve(losses, "epoch", "loss", said)))
    if r["method"] == "dense":
        return cards
    if history := tables.rank_history(r):
        over = tables.ranks_over_training(r)
        full, names = full_ranks(r), [row[0] for row in over.rows]
        said = f"Ranks of {len(names)} layers over {len(history)} epochs; the table holds numbers"
        note = "Full colour: the layer's highest rank; grey: dense. Right: the last rank."
        cards.append(_card(over.title, pictures.heat_map(history, full, names, said), note, over))
    plan = plan_of(r)
    if plan is not None and plan.macs_dense:
        cost = tables.layers(r)
        said = f"MACs of {len(plan.layers)} layers before and after; the table holds numbers"
        cards.append(
            _card(
                cost.title,
                pictures.bars(plan.layers, tables.examples(r, plan), said),
                "Wide: dense. Narrow: decomposed, with its rank.",
                cost,
            )
        )
    return cards


def _spectra(r: Result) -> list[Element]:
    table = tables.spectra(r)
    if not table.rows:
        return []
    before, after = r["spectra"]["before"], r["spectra"]["after"]
    small = []
    for name, values in after.items():
        rank = r["ranks"].get(name)
        said = f"Singular values of {name}, rank {rank} of {len(values)}"
        picture = pictures.spectrum(before.get(name, ()), values, rank, said)
        caption = element("figcaption", element("span", name, class_="name"), f" {rank}/{len(values)}" if rank else " dense")
        small.append(element("figure", picture, caption))
    pair = f"before {between_spectra(r)} (grey) and after it (blue)"
    note = f"Singular values over the layer's largest, {pair}, by index. The dashed line is the rank."
    return [
        element("h3", table.title),
        element("p", note, class_="note"),
        element("div", small, class_="small-multiples"),
        _folded("As a table", table),
    ]


def _card(title: str, picture: Element, note: str = "", table: Table | None = None) -> Element:
    parts = [element("p", note, class_="note")] if note else []
    parts += [_folded("As a table", table)] if table else []
    return element("figure", element("figcaption", element("h3", title)), picture, parts, class_="card")


def _titled(table: Table) -> Element:
    return element("div", element("h3", table.title), _scrolled(table), class_="card")


def _folded(title: str, table: Table) -> Element:
    return element("details", element("summary", title), _scrolled(table))


def _scrolled(table: Table) -> Element:
    """The table in a box of its own, which scrolls sideways where the page is narrow."""
    note = [element("p", table.note, class_="note")] if table.note else []
    heads = [element("th", name, scope="col", class_="long" if len(name) > 16 else "short") for name in table.columns]
    rows = [
        element("tr", element("th", row[0], scope="row"), [_cell(cell, i < table.words) for i, cell in enumerate(row[1:], 1)])
        for row in table.rows
    ]
    grid = element(
        "table",
        element("thead", element("tr", heads)),
        element("tbody", rows),
        class_=f"words-{table.words}{' prose' if table.words == len(table.columns) else ''}",
    )
    return element("div", element("div", grid, class_="scroll", role="region", aria_label=table.title, tabindex="0"), note)


def _cell(text: str, words: bool) -> Element:
    """A cell; a rank of a full one, like 9/16, gets a shade."""
    rank, _, full = text.partition("/")
    shade = f" s{round(10 * Fraction(int(rank), int(full)))}" if rank.isdecimal() and full.isdecimal() and int(full) else ""
    return element("td", text, class_=f"{'word' if words else 'number'}{shade}")
