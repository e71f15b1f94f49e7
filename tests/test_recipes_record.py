"""Results of experiments as files: whose they are, and what others take from them."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from rankprune.recipes.experiment import Experiment, Folders, TrpConfig
from rankprune.recipes.record import finished, in_short, provenance, top1_of_a_run, write
from rankprune.state_dicts import save_tensors

TINY = Experiment("tiny", dataset="tiny")


def test_a_result_is_of_its_experiment_only(tmp_path: Path) -> None:
    path, weights = tmp_path / "tiny.json", tmp_path / "tiny" / "dense.safetensors"
    weights.parent.mkdir()

    def keep(config: dict[str, Any]) -> None:
        write({"config": config}, path)
        save_tensors(weights, nn.Linear(1, 1), {"settings": json.dumps(config)})

    assert not finished(TINY, path, tmp_path)
    path.write_text("{")
    assert not finished(TINY, path, tmp_path)
    config = json.loads(json.dumps(asdict(TINY)))
    del config["training"]["milestones"]  # of a version that had none
    keep(config)
    assert finished(TINY, path, tmp_path)
    assert not finished(replace(TINY, training=replace(TINY.training, milestones=(1,), epochs=2)), path, tmp_path)
    assert not finished(replace(TINY, trp=TrpConfig(every=3)), path, tmp_path)
    assert not finished(replace(TINY, trp=TrpConfig(ramp=0.0, freeze=0.0)), path, tmp_path)
    keep(asdict(replace(TINY, trp=TrpConfig(ramp=0.0))))
    assert not finished(replace(TINY, trp=TrpConfig(ramp=0.0, freeze=0.0)), path, tmp_path), "from the start, and never"
    assert finished(replace(TINY, training=replace(TINY.training, checkpoint_steps=9), trp=TrpConfig(ramp=0.0)), path, tmp_path)
    write({"config": config}, path)
    assert not finished(TINY, path, tmp_path), "the weights are of other settings"
    keep(config)
    weights.unlink()  # as in a fresh clone
    assert not finished(TINY, path, tmp_path)


def test_a_reference_elsewhere_was_tested_on_the_same_part_of_the_same_photographs(tmp_path: Path) -> None:
    folders = Folders(tmp_path, tmp_path, tmp_path / "runs", tmp_path)
    photographs = {"test_resize": 146, "test_size": 128, "sizes": [96]}
    here = {"model": "resnet18", "dataset": "d", "test_split": "test", "test_images": 9, "source": "a", "test_digest": None}
    here["config"] = {"photographs": photographs}
    there = here | {"top1_before_decomposition": 70.0, "config": {"photographs": photographs | {"sizes": [64]}}}
    others = [{"source": "b"}, {"config": {"photographs": photographs | {"test_size": 112}}}, {"config": {}}]
    for change, found in [({}, 70.0), *((other, None) for other in others)]:
        write(there | change, tmp_path / "dense.json")
        assert top1_of_a_run("run:dense", folders, here) == found, change


def test_several_processes_are_told() -> None:
    assert "8 processes" in in_short(provenance(8))
    assert "process" not in in_short(provenance())
