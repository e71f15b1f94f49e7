"""What the tables of a report say, for the terminal, Markdown and the page alike."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase

from rankprune.plan import Plan
from rankprune.report.names import epochs_among, flat, method, settings_apart, task
from rankprune.report.results import (
    Result,
    between_spectra,
    full_ranks,
    in_order,
    is_timed,
    machine,
    mean_of,
    of_full,
    plan_of,
    seeds_together,
)

OLDER = "Not in this result, which another version of rankprune wrote."
NOTHING = "No layer was decomposed."


@dataclass(frozen=True)
class Table:
    """Cells as they are shown: the first `words` columns hold words, the others numbers; `note` says what else to know."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: int = 1
    note: str = ""


def tables(results: Sequence[Result], each: bool = False) -> list[Table]:
    """The overview of each network; then, of one run all the tables, and of several the ranks of each side by side.

    With `each`, all the tables of every run follow these, under its name.
    """
    if len(results) == 1:
        return [*overview(results), *run_tables(results[0])]
    runs = in_order(results) if each else []
    named = [replace(table, title=f"{r['name']}: {table.title}") for r in runs for table in run_tables(r)]
    return [*overview(results), *ranks_together(results), *named]


def run_tables(r: Result) -> list[Table]:
    """All tables of one run."""
    if r["method"] == "dense":
        return [figures(r), config(r)]
    return [figures(r), latency(r), ranks_over_training(r), spectra(r), layers(r), skipped(r), config(r)]


def overview(results: Sequence[Result]) -> list[Table]:
    """For each network on the same images one row for each experiment, seeds averaged: accuracy, drop, cost, time.

    The drop is the reference's accuracy minus that after decomposition, in points. Where several machines took the times,
    each time names its own by a letter. The last of the tables has the note for all.
    """
    columns = ("method", "scheme", "epochs", "top-1 %", "drop", "MACs", "fewer", "params", "fewer", "ms, batch 64", "faster")
    groups = seeds_together(in_order(results))
    epochs, settings = epochs_among(results), settings_apart(results)
    machines = dict.fromkeys(filter(None, (machine(r) for r in map(mean_of, groups) if is_timed(r))))
    letters = dict(zip(machines, ascii_uppercase, strict=False)) if len(machines) > 1 else {}
    rows: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for group in groups:
        name = ", ".join(filter(None, (method(group[0]), settings(group[0]))))
        rows[f"{group[0]['model']} on {task(group[0])}"].append(_row(group, name, epochs(group[0]), letters))
    note = "Drop: the dense network of the same seed minus the decomposed one."
    unknown = any("top1_dense" not in r for r in results if r["method"] != "dense")
    note += " Where it is blank, no dense network was named to compare with." if unknown else ""
    tuned = any("top1_before_finetuning" in r for r in results)
    note += " From: before fine-tuning." if tuned else ""
    if len(groups) < len(results):
        note += " Means over seeds, ± their standard deviation"
        note += "; their times are of one machine." if letters else "."
    note += f" ms: {'; '.join(f'{letter} on {name}' for name, letter in letters.items())}." if letters else ""
    found = [Table(title, columns, made, words=2) for title, made in rows.items()]
    return [*found[:-1], replace(found[-1], note=note)]


def _row(group: list[Result], name: str, epochs: str, letters: Mapping[str, str]) -> tuple[str, ...]:
    r = mean_of(group)
    ms = _milliseconds(r, letters) if is_timed(r) else ""
    cells = [name, r["scheme"] or "", epochs]
    if r["method"] == "dense":
        costs = (f"{r['macs']:,}", "", f"{r['params']:,}", "", ms, "")
        return (*cells, _spread([g["top1"] for g in group]), "", *costs)
    tuned = _spread([g["top1_before_finetuning"] for g in group if "top1_before_finetuning" in g])
    accuracy = _spread([g["top1"] for g in group]) + (f" (from {tuned})" if tuned else "")
    cells += [accuracy, _spread([g["top1_dense"] - g["top1"] for g in group if "top1_dense" in g])]
    cells += [f"{r['macs']:,}", times(r["macs_dense"], r["macs"]), f"{r['params']:,}", times(r["params_dense"], r["params"])]
    return (*cells, ms, times(r["ms_dense"], r["ms"]) if is_timed(r) else "")


def _milliseconds(r: Result, letters: Mapping[str, str]) -> str:
    """Those of the decomposed network, what they are of if not of PyTorch eager and 64 images, and the machine's letter."""
    batch, backend = r.get("ms_batch", 64), r.get("ms_backend", "eager")
    notes = [f"batch {batch}" if batch != 64 else "", backend if backend != "eager" else "", letters.get(machine(r), "")]
    said = ", ".join(note for note in notes if note)
    return f"{r['ms']:.1f}" + (f" ({said})" if said else "")


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def times(before: float, after: float) -> str:
    """How many times less `after` is than `before`."""
    return f"{before / after:.2f}x"


def ranks_together(results: Sequence[Result]) -> list[Table]:
    """For each network with ranks a table of them: a row for each layer, a column for each run."""
    found = []
    for model in dict.fromkeys(r["model"] for r in results):
        runs = [r for r in in_order(results) if r["model"] == model and r.get("ranks")]
        known = [full_ranks(r) for r in runs]
        names = _merged([list(r["ranks"]) for r in runs])
        rows = [
            (name, *(of_full(r["ranks"].get(name), full.get(name)) for r, full in zip(runs, known, strict=True)))
            for name in names
        ]
        if runs:
            note = "Rank of each layer, and its full rank where the result holds it."
            found.append(Table(f"Ranks of {model}, run by run", ("layer", *(r["name"] for r in runs)), rows, note=note))
    return found


def _merged(lists: Sequence[Sequence[str]]) -> list[str]:
    """Every name once; one that a list lacks stands after the name before it in the lists that have it."""
    merged: list[str] = []
    for names in lists:
        place = 0
        for name in names:
            if name not in merged:
                merged.insert(place, name)
            place = merged.index(name) + 1
    return merged


def figures(r: Result) -> Table:
    """Accuracy, MACs and parameters, dense and decomposed."""
    if r["method"] == "dense":
        rows = [("top-1", f"{r['top1']:.2f} %"), ("MACs", f"{r['macs']:,}"), ("params", f"{r['params']:,}")]
        rows += [(timed_on(r), f"{r['ms']:.1f}")] if is_timed(r) else []
        return Table("Figures", ("", "dense"), rows)
    dense = f"{r['top1_dense']:.2f}" if "top1_dense" in r else ""
    drop = f"{r['top1_dense'] - r['top1']:.2f} points lost" if "top1_dense" in r else ""
    before = r.get("top1_before_finetuning")
    rows = [
        ("top-1 %", dense, f"{r['top1_before_decomposition']:.2f}", f"{r['top1']:.2f}", drop),
        *([("top-1 %, not fine-tuned", "", "", f"{before:.2f}", "")] if before is not None else []),
        ("MACs", f"{r['macs_dense']:,}", "", f"{r['macs']:,}", f"{times(r['macs_dense'], r['macs'])} fewer"),
        ("params", f"{r['params_dense']:,}", "", f"{r['params']:,}", f"{times(r['params_dense'], r['params'])} fewer"),
    ]
    return Table("Figures", ("", "dense", "before", "decomposed", "change"), rows, note="Before: what was decomposed.")


def latency(r: Result) -> Table:
    """Milliseconds, and what they were taken on."""
    if not is_timed(r):
        return Table("Latency", (), (), note=OLDER)
    batch, spread = str(r.get("ms_batch", "")), f"{r['ms_spread']:.1%}" if "ms_spread" in r else ""
    plan, faster = plan_of(r), times(r["ms_dense"], r["ms"])
    predicted = times(plan.ms_dense, plan.ms) if plan is not None and plan.ms_dense and plan.ms else ""
    row = r.get("ms_backend", "eager"), batch, f"{r['ms_dense']:.1f}", f"{r['ms']:.1f}", faster, predicted, spread
    where = machine(r)
    note = "Medians; spread: the larger of the two interquartile ranges, of its median. Predicted where ranks go by time."
    columns = ("runtime", "batch", "dense ms", "decomposed ms", "faster", "predicted", "spread")
    return Table("Latency", columns, [row], note=f"{where}. {note}" if where else note)


def timed_on(r: Result) -> str:
    """What milliseconds are of."""
    return f"ms, batch {r.get('ms_batch', '')}, {r.get('ms_backend', 'eager')}"


def ranks_over_training(r: Result, columns: int = 8) -> Table:
    """The rank of each layer after some of the epochs, evenly spaced, the last one among them."""
    history = rank_history(r)
    title = "Ranks over training"
    if not history:
        note = "The network was decomposed without training at low rank." if r["ranks"] else NOTHING
        return Table(title, (), (), note=note)
    last = len(history) - 1
    shown = sorted({round(i * last / max(1, columns - 1)) for i in range(columns)})
    picked = [history[i] for i in shown]
    rows = [
        (name, *(of_full(ranks.get(name), None) for _, ranks in picked))
        for name in _merged([list(ranks) for _, ranks in history])
    ]
    return Table(title, ("layer", *(str(epoch) for epoch, _ in picked)), rows, note="After the epochs on top.")


def rank_history(r: Result) -> list[tuple[int, Mapping[str, int]]]:
    """The epochs with ranks, the first epoch of a training being 1, and the ranks at their ends."""
    return [(entry["epoch"] + 1, entry["ranks"]) for entry in r.get("log", ()) if entry.get("ranks")]


def spectra(r: Result) -> Table:
    """For each layer its full rank, its rank, and how many singular values are above a hundredth of the largest."""
    title = "Spectra"
    if "spectra" not in r:
        return Table(title, (), (), note=OLDER)
    if not r["ranks"]:
        return Table(title, (), (), note=NOTHING)
    before, after = r["spectra"]["before"], r["spectra"]["after"]
    rows = [
        (
            name,
            *(str(sum(v > 0.01 for v in s.get(name, ()))) for s in (before, after)),
            str(r["ranks"].get(name, "")),
            str(len(values)),
        )
        for name, values in after.items()
    ]
    note = f"Singular values above 1 % of the layer's largest, before {between_spectra(r)} and after it."
    return Table(title, ("layer", "above 1 % before", "after", "rank", "full rank"), rows, note=note)


def layers(r: Result) -> Table:
    """What each layer becomes and costs."""
    title, plan = "Cost per layer", plan_of(r)
    if plan is None:
        return Table(title, (), (), note=OLDER)
    timed = plan.ms_dense is not None
    columns = ("layer", "weight", "scheme", "rank", "energy lost", "MACs before", "after", "params before", "after")
    rows = []
    for e in plan.layers:
        scheme, rank, lost = (
            (e.scheme or "", of_full(e.rank, e.full_rank), f"{e.error:.2%}") if e.becomes_pair else ("dense", "", "")
        )
        costs = [f"{v:,}" if v is not None else "" for v in (e.macs_before, e.macs_after, e.params_before, e.params_after)]
        costs += [f"{v:.3f}" if v is not None else "" for v in (e.ms_before, e.ms_after)] if timed else []
        rows.append((e.name, f"{e.kind} {'x'.join(map(str, e.shape))}", scheme, rank, lost, *costs))
    notes = [f"MACs of {examples(r, plan)}; energy lost: share of the squared singular values beyond the rank."]
    notes += ["ms: predicted."] if timed else []
    notes += [f"MACs not counted: {', '.join(plan.uncounted)}."] if plan.uncounted else []
    return Table(title, (*columns, *(("ms before", "after") if timed else ())), rows, words=3, note=" ".join(notes))


def examples(r: Result, plan: Plan) -> str:
    """How many examples the MACs in a plan are of: as many as were timed together."""
    count = round((plan.macs_dense or 0) / r["macs_dense"]) if r["macs_dense"] else 1
    return f"{count} examples" if count > 1 else "one example"


def skipped(r: Result) -> Table:
    """Why layers stay dense: a row for each reason."""
    title, plan = "Layers that stay dense", plan_of(r)
    if plan is None:
        return Table(title, (), (), note=OLDER)
    if not plan.skipped:
        return Table(title, (), (), note="None.")
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in plan.skipped.items():
        by_reason[reason].append(name)
    return Table(title, ("reason", "layers"), [(reason, ", ".join(names)) for reason, names in by_reason.items()], words=2)


def config(r: Result) -> Table:
    """The settings of a run and what it was made with, a row each."""
    made = {k: r[k] for k in ("commit", "versions", "cpu", "gpu", "processes", "threads", "date", "wall_s") if k in r}
    if trained := list(dict.fromkeys(entry["by"] for entry in r.get("log", ()) if entry.get("by"))):
        made["trained by"] = "; ".join(trained)
    if timed := [entry for entry in r.get("log", ()) if entry.get("input_share") is not None]:
        seconds = sum(entry["seconds"] for entry in timed)
        waited = sum(entry["input_share"] * entry["seconds"] for entry in timed)
        made["waited for input"] = f"{waited / seconds if seconds else 0:.1%} of the time"
    return Table("Config", ("setting", "value"), flat(r["config"]) + flat(made), words=2)
