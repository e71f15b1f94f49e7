"""Results of experiments: reading their JSON files, naming them, and grouping those that differ in their seed only."""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rankprune.errors import CheckpointError, RankPruneError
from rankprune.plan import Plan
from rankprune.recipes.settings import in_force
from rankprune.rules import Budget, parse_rule

Result = dict[str, Any]
_WRITERS = "name the folder of a `rankprune train` (its --out), or that of the results of `rankprune bench run`"
_ALWAYS = {"name", "model", "dataset", "method", "scheme", "test_split", "config", "macs_dense", "params_dense"}
_JUDGED = {"top1_before_decomposition", "top1", "macs", "params"}
IMAGES = "dataset", "source", "test_split", "train_images", "test_images", "test_digest"
_COSTS = "macs_dense", "macs", "params_dense", "params"
_TIMES = "ms_dense", "ms"
_TIMED_ON = "cpu", "gpu", "threads", "ms_threads", "ms_device", "ms_backend", "ms_batch"


def read_results(paths: Iterable[str | Path]) -> list[Result]:
    """The results of experiments in folders and single files, in the order of the paths, those of a folder by file name.

    Of the folders in a folder result.json counts, too, as trainings leave it. Files in a folder that hold something else,
    such as other benchmarks, are left alone.

    Raises:
        RankPruneError: if there is none, a file is not JSON, one asked for by name is no result, or a result lacks a field.
    """
    paths = [Path(path) for path in paths]
    results: dict[Path, Result] = {}
    for path in paths:
        if not path.exists():
            raise RankPruneError(f"there is no {str(path)!r}; {_WRITERS}")
        for file in [*sorted(path.glob("*.json")), *sorted(path.glob("*/result.json"))] if path.is_dir() else [path]:
            data = _read(file)
            if file != path and not (isinstance(data, dict) and data.keys() >= _ALWAYS):
                continue
            lacking = sorted(_needed(data) - data.keys()) if isinstance(data, dict) else ["all fields"]
            if lacking:
                raise RankPruneError(f"{str(file)!r} is no result of an experiment: it lacks {', '.join(lacking)}")
            results[file.resolve()] = data
    if not results:
        named = ", ".join(repr(str(path)) for path in paths)
        raise RankPruneError(f"no results of experiments in {named}; {_WRITERS}")
    return list(results.values())


def _needed(data: Result) -> set[str]:
    """The fields that a result needs: one more, if its network was decomposed."""
    return _ALWAYS | _JUDGED | ({"top1_dense"} if data.get("method", "dense") == "dense" else {"ranks"})


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise RankPruneError(f"cannot read the result {str(file)!r}: {error.strerror}") from error
    except ValueError as error:
        raise RankPruneError(f"{str(file)!r} is not JSON ({error})") from error


def _refuse(number: str) -> None:
    raise ValueError(f"{number} is no number of JSON")


def in_order(results: Sequence[Result]) -> list[Result]:
    """The results in the order of all tables: by images and network, dense ones first, then by MACs.

    Those of one budget stand together, though they do not cost quite the same: with a teacher beside without.
    """

    def place(r: Result) -> tuple[Any, ...]:
        return (r["dataset"], r["model"], from_scratch(r), r["method"] != "dense", _asked(r), r["scheme"] or "", r["name"])

    return sorted(results, key=place)


def _asked(r: Result) -> float:
    """The MACs that a budget allowed; without one, those that are left."""
    budget = budget_of(r)
    if budget is None or budget.macs is None or r["method"] == "dense":
        return r["macs"]
    return budget.macs * r["macs_dense"]


def budget_of(r: Result) -> Budget | None:
    """The rule that its ranks were to be chosen by, where that is a budget."""
    try:
        rule = parse_rule(r["config"]["trp"]["rule"])
    except (KeyError, RankPruneError):
        return None
    return rule if isinstance(rule, Budget) else None


def seeds_together(results: Sequence[Result]) -> list[list[Result]]:
    """The results grouped by experiment: those in one group differ in their seed only, also in that of what they build on.

    Settings that are off count as left out, for older results lack those that came later, and so do those without effect.
    """
    groups: dict[tuple[str, int], list[Result]] = defaultdict(list)
    for r in results:
        key = json.dumps([r["model"], *(r.get(field) for field in IMAGES), r["method"], r["scheme"], settings_of(r)])
        again = 0  # the same seed twice is two experiments, whatever they differ in
        while any(other.get("seed") == r.get("seed") for other in groups.get((key, again), ())):
            again += 1
        groups[key, again].append(r)
    return list(groups.values())


def mean_of(group: Sequence[Result]) -> Result:
    """The first result of a group, with what its networks cost averaged over the group.

    What they take is averaged over those that were timed alike, on one machine: where there are several, over the most.
    """
    means: Result = {cost: round(statistics.mean(r[cost] for r in group)) for cost in _COSTS}
    alike: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for r in filter(is_timed, group):
        alike[machine(r), r.get("ms_backend"), r.get("ms_batch")].append(r)
    if alike:
        timed = max(alike.values(), key=len)
        means |= {field: timed[0][field] for field in _TIMED_ON if field in timed[0]}
        means |= {time: statistics.mean(r[time] for r in timed) for time in _TIMES}
    rest = {key: value for key, value in group[0].items() if key not in (_TIMED_ON if alike else ())}
    return {**rest, **means}


def settings_of(r: Result) -> dict[str, Any]:
    """What it was made with: all settings that are in force, without seeds, its name, and what it is compared with."""
    return {k: _chosen(v) for k, v in in_force(r["config"]).items() if k not in ("name", "reference")}


def _chosen(value: Any) -> Any:
    """A table of settings without the seed; where weights come from without the seed of that run."""
    if isinstance(value, str):
        return without_seed(value)
    return {k: v for k, v in value.items() if k != "seed"} if isinstance(value, dict) else value


def without_seed(name: str) -> str:
    """The name of a run, or a path with such names in it, without the seeds that they end in."""
    return re.sub(r"-seed\d+(?=/|$)", "", name)


def from_scratch(r: Result) -> bool:
    """Whether the training began without pretrained weights."""
    return r["config"].get("start") is None


def is_timed(r: Result) -> bool:
    """Whether it tells the milliseconds of both networks."""
    return r.keys() >= {"ms", "ms_dense"}


def machine(r: Result) -> str:
    """What a result was timed on, as far as it says."""
    threads = r.get("ms_threads", r.get("threads"))
    on_gpu = r.get("ms_device", r.get("gpu")) == r.get("gpu")  # some runtimes compute on the CPU, whatever is beside it
    parts = [
        r.get("gpu") if on_gpu else None,
        r.get("cpu"),
        f"{threads} thread{'s' if threads != 1 else ''}" if threads else None,
    ]
    return ", ".join(part for part in parts if part)


def dense_networks(results: Sequence[Result]) -> dict[str, list[float]]:
    """The top-1 accuracies of the dense networks that results compare with, one for each seed, by name."""
    found: dict[str, dict[Any, float]] = defaultdict(dict)
    for r in results:
        if "top1_dense" in r:
            name = r["name"] if r["method"] == "dense" else (r["config"].get("reference") or "dense").removeprefix("run:")
            found[without_seed(name)][r.get("seed")] = r["top1_dense"]
    return {name: list(tops.values()) for name, tops in found.items()}


def between_spectra(r: Result) -> str:
    """What lies between the two spectra of a result: where it decomposed without training first, no training does."""
    return "truncation" if r["method"].startswith("decompose") else "training"


def plan_of(r: Result) -> Plan | None:
    """The plan of a result; None where there is none that this version reads, as of a dense network or in an older file."""
    try:
        return Plan.from_json(json.dumps(r.get("plan")))
    except CheckpointError:
        return None


def of_full(rank: int | None, full: int | None) -> str:
    """A layer's rank as it is shown, like 9/16, with its full rank where that is known."""
    if rank is None:
        return "dense"
    return f"{rank}/{full}" if full else str(rank)


def full_ranks(r: Result) -> dict[str, int]:
    """The full rank of every layer whose rank the result tells, as far as it tells that too."""
    spectra = r.get("spectra", {}).get("after", {})
    plan = plan_of(r)
    known = {name: len(values) for name, values in spectra.items()}
    return known | {e.name: e.full_rank for e in plan.layers if e.full_rank} if plan else known
