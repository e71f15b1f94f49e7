"""Markdown tables from the JSON files of finished experiments."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankprune.errors import RankPruneError

Result = dict[str, Any]
BEGIN, END = "<!-- results: written by `rankprune report` -->", "<!-- end of results -->"


def read_results(folder: str | Path) -> list[Result]:
    """All results in a folder that are of an experiment, sorted by file name.

    Raises:
        RankPruneError: if there is none, or a file is not JSON.
    """
    results = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise RankPruneError(f"{str(path)!r} is not JSON ({error})") from error
        if "method" in result:
            results.append(result)
    if not results:
        raise RankPruneError(f"no results of experiments in {str(folder)!r}; write some with `rankprune bench run`")
    return results


def markdown_table(results: Sequence[Result]) -> str:
    """One row for each experiment, seeds averaged: accuracy, drop against the dense rows of the same model, cost, time.

    The drop is the dense network's accuracy minus that after decomposition, in points; the dense rows it is taken from are
    those of the same model, data set and test split with the same epochs, or, for "decompose", the network that was decomposed.
    """
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for r in results:
        groups[_kind(r)].append(r)
    lines = [
        "| network | method | scheme | epochs | top-1 % | drop | MACs | fewer | params | fewer | ms, batch 64 | faster |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    order = sorted(groups.values(), key=lambda g: (g[0]["model"], g[0]["method"] != "dense", _macs(g[0]), g[0]["name"]))
    return "\n".join([*lines, *(_row(group, results) for group in order)])


def _kind(r: Result) -> tuple[Any, ...]:
    """What is the same for all seeds of one experiment."""
    return r["model"], r["dataset"], r["test_split"], r["method"], r["scheme"], r["epochs"], str(r["config"].get("trp"))


def _macs(r: Result) -> int:
    return r.get("macs", r["macs_dense"])


def _row(group: list[Result], results: Sequence[Result]) -> str:
    r = group[0]
    cells = [r["model"], r["method"], r["scheme"] or "", str(r["epochs"] or "")]
    if r["method"] == "dense":
        top1 = _spread([g["top1_dense"] for g in group])
        return _line([*cells, top1, "", f"{r['macs_dense']:,}", "", f"{r['params_dense']:,}", "", "", ""])
    cells += [_spread([g["top1"] for g in group]), _spread([d for g in group if (d := _drop(g, results)) is not None])]
    cells += [f"{r['macs']:,}", f"{r['macs_dense'] / r['macs']:.2f}x", f"{r['params']:,}"]
    cells += [f"{r['params_dense'] / r['params']:.2f}x"]
    return _line([*cells, f"{r['ms']:.1f}", f"{r['ms_dense'] / r['ms']:.2f}x"])


def _drop(r: Result, results: Sequence[Result]) -> float | None:
    if r["method"].startswith("decompose"):
        return r["top1_before_decomposition"] - r["top1"]
    same = ("model", "dataset", "test_split", "epochs")
    dense = [d["top1_dense"] for d in results if d["method"] == "dense" and all(d[k] == r[k] for k in same)]
    return statistics.mean(dense) - r["top1"] if dense else None


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def replace_between_marks(text: str, table: str) -> str:
    """`text` with what stands between the two marks replaced by `table`.

    Raises:
        RankPruneError: if a mark is missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise RankPruneError(f"the file lacks the lines {BEGIN} and {END}, between which the table goes")
    return f"{head}{begin}\n{table}\n{end}{tail}"
