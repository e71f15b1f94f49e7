"""The experiments on photographs: model, method, rule, scheme and losses of each file, on a few pictures for two steps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rankprune as rp
from rankprune.recipes.experiment import Experiment, Folders
from rankprune.recipes.networks import build
from rankprune.recipes.runner import run
from rankprune.rules import parse_rule

ROWS = sorted((Path(__file__).parent.parent / "benchmarks" / "experiments").glob("imagenet*.toml"))
SOON = (
    "imagenet-resnet18-dense",
    "imagenet-resnet18-trp-channel-nu-3.18x",
    "imagenet-resnet18-finetune-spatial-1.41x",
    "imagenette-resnet18-ours-spatial-2.23x-distilled",
)


def on_few_pictures(row: Experiment) -> Experiment:
    """It for two classes, a random network in place of what it goes on from, and two steps with a projection after each."""
    photographs = row.photographs
    assert photographs is not None

    def other(source: str | None) -> str | None:
        return source and "start.th"

    changed: dict[str, Any] = {role: other(getattr(row, role)) for role in ("start", "teacher", "reference")}
    return replace(
        row,
        **changed,
        batch=4,
        training=replace(row.training, epochs=1, warmup_steps=0, compile=False),
        trp=replace(row.trp, every=1),
        photographs=replace(photographs, sources=["two"], sizes=[32], test_resize=36, test_size=32, workers=0),
    )


def test_rows_of_the_fast_suite_are_there() -> None:
    assert {*SOON} <= {row.stem for row in ROWS}


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.stem, marks=[] if row.stem in SOON else pytest.mark.slow) for row in ROWS]
)
def test_a_row_runs_on_a_few_pictures(row: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 8), ("val", 4)):
        for i, name in enumerate(("dark", "light") * (count // 2)):
            path = tmp_path / "data" / "two" / split / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.new("RGB", (40 + i, 50), (40 + 160 * (i % 2), 90, 90 + i)).save(path)
    folders = Folders(tmp_path / "data", tmp_path / "models", tmp_path / "runs")
    e = on_few_pictures(Experiment.read(row))
    folders.models.mkdir()
    torch.manual_seed(0)
    torch.save(build(e.model, 2).state_dict(), folders.models / "start.th")
    result = json.loads(json.dumps(run(e, folders)))
    assert (result["name"], result["train_images"], result["test_images"]) == (row.stem, 8, 4)
    assert len(result["log"]) == (e.method != "decompose")
    if e.method == "dense":
        return
    small = rp.load(folders.runs / row.stem / "artefact", build(e.model, 2))
    assert rp.count(small, torch.zeros(1, 3, 32, 32)).macs == result["macs"]
    if isinstance(rule := parse_rule(e.trp.rule), rp.Budget):
        assert 0.9 * rule.fraction < result["macs"] / result["macs_dense"] <= rule.fraction
