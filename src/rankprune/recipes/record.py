"""The result of an experiment as a file: what it was made with, whose it is, and what others take from it."""

import datetime
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import rankprune
from rankprune.errors import RankPruneError
from rankprune.files import draft_of
from rankprune.machine import cpu_name
from rankprune.recipes.experiment import Experiment, Folders
from rankprune.recipes.networks import RUN, WEIGHTS
from rankprune.recipes.settings import in_force
from rankprune.state_dicts import read_notes


def provenance(processes: int = 1) -> dict[str, Any]:
    """What a result that is begun now, here, by so many processes, is made with."""
    return {
        "commit": commit(),
        "versions": {
            "rankprune": rankprune.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.date.today().isoformat(),
    }


def in_short(made: Mapping[str, Any]) -> str:
    """The provenance in a line: commit, machine, processes if there are several, threads, date."""
    several = f"{made['processes']} processes" if made["processes"] > 1 else None
    threads = f"{made['threads']} thread{'s' if made['threads'] != 1 else ''}"
    return ", ".join(filter(None, (made["commit"], made["gpu"], made["cpu"], several, threads, made["date"])))


def commit() -> str | None:
    """The commit of the checkout this file is in, with a + if files but results differ from it; None outside a checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", here.name):  # installed into someone else's
            return None
        made_by = ":/src", ":/benchmarks", ":(top,exclude)benchmarks/results", ":/pyproject.toml"
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *made_by)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def finished(experiment: Experiment, path: Path, runs: Path) -> bool:
    """Whether the file has a result of this experiment, and `runs` its weights, that others build on.

    Settings that are off there or here count as left out.
    """
    settings = settings_of(experiment)
    noted = read_notes(runs / experiment.name / WEIGHTS).get("settings")
    return noted is not None and in_force(json.loads(noted)) == settings == _settings_in(path)


def check_unused(experiment: Experiment, path: Path) -> None:
    """Make sure that a result would not be written over that of another experiment.

    Raises:
        RankPruneError: if the file holds such a result.
    """
    there, here = _settings_in(path), settings_of(experiment)
    if there is not None and in_force(there | {"name": experiment.name}) != here:
        raise RankPruneError(f"{str(path)!r} is the result of another run, which this one would replace: take another folder")


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """All settings that are in force, as JSON has them."""
    return in_force(json.loads(json.dumps(asdict(experiment))))


def _settings_in(path: Path) -> dict[str, Any] | None:
    """Those of the experiment whose result a file holds; None if it holds none."""
    try:
        return in_force(dict(json.loads(path.read_text())["config"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(result: dict[str, Any], path: Path) -> Path:
    """Write a result to a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(path) as draft:
        draft.write_text(json.dumps(result, indent=1) + "\n")
    return path


def top1_of_a_run(source: str, folders: Folders, result: Mapping[str, Any]) -> float | None:
    """What the result of a run says of its dense weights, on the same images, where they are on another machine."""
    name = source.removeprefix(RUN)
    if name == source or folders.results is None or (folders.runs / name / WEIGHTS).is_file():
        return None
    try:
        there = json.loads((folders.results / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    images = ("model", "dataset", "test_split", "test_images", "source", "test_digest")
    same = all(there.get(key) == result[key] for key in images) and _crops(there) == _crops(result)
    return there.get("top1_before_decomposition") if same else None


def _crops(result: Mapping[str, Any]) -> list[Any] | None:
    """Which photographs were tested on, and which part of them; None for images that are taken whole."""
    photographs = result["config"].get("photographs")
    return photographs and [photographs.get(key) for key in ("test_split", "test_resize", "test_size")]
