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
    """One row for each experiment, seeds averaged: accuracy, drop against its dense reference, cost, time.

    The drop is the reference's accuracy minus that after decomposition, in points.
    """
    lines = [
        "| network | method | scheme | epochs | top-1 % | drop | MACs | fewer | params | fewer | ms, batch 64 | faster |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]

    def place(group: list[Result]) -> tuple[Any, ...]:
        r = group[0]
        return r["model"], _from_scratch(r), r["method"] != "dense", macs(r), r["name"]

    return "\n".join([*lines, *(_row(group) for group in sorted(seeds_together(results), key=place))])


def seeds_together(results: Sequence[Result]) -> list[list[Result]]:
    """The results grouped by experiment: those in one group differ in their seed only."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for r in results:
        config = {k: v for k, v in r["config"].items() if k not in ("name", "start", "teacher", "reference")}
        config["scratch"] = _from_scratch(r)
        config["training"] = {k: v for k, v in config.get("training", {}).items() if k != "seed"}
        groups[json.dumps([r["model"], r["dataset"], r["test_split"], r["method"], r["scheme"], config])].append(r)
    return list(groups.values())


def label(r: Result) -> str:
    """What to call the method of a result: its name, its scheme, and what it had help from."""
    words = [r["method"], r["scheme"] or ""]
    words += ["distilled"] if r["config"].get("training", {}).get("distill") else []
    words += ["from scratch"] if _from_scratch(r) else []
    return " ".join(word for word in words if word)


def macs(r: Result) -> int:
    """The multiply-accumulates of the network that a result is about."""
    return r.get("macs", r["macs_dense"])


def _from_scratch(r: Result) -> bool:
    return r["config"].get("start") is None


def _row(group: list[Result]) -> str:
    r = group[0]
    method = label({**r, "scheme": None})
    cells = [r["model"], method, r["scheme"] or "", str(r["epochs"] or "")]
    if r["method"] == "dense":
        top1 = _spread([g["top1_dense"] for g in group])
        return _line([*cells, top1, "", f"{r['macs_dense']:,}", "", f"{r['params_dense']:,}", "", "", ""])
    cells += [_spread([g["top1"] for g in group]), _spread([g["top1_dense"] - g["top1"] for g in group if "top1_dense" in g])]
    cells += [f"{r['macs']:,}", f"{r['macs_dense'] / r['macs']:.2f}x", f"{r['params']:,}"]
    cells += [f"{r['params_dense'] / r['params']:.2f}x"]
    return _line([*cells, f"{r['ms']:.1f}", f"{r['ms_dense'] / r['ms']:.2f}x"])


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
