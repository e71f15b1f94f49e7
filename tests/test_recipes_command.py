"""rankprune train on photographs."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from torch import nn

from rankprune.errors import RankPruneError
from rankprune.recipes.experiment import Experiment, TrpConfig
from rankprune.state_dicts import save_tensors

invoke = pytest.importorskip("command_line", exc_type=ImportError).invoke
Image = pytest.importorskip("PIL.Image")


def test_train_and_evaluate_resnet18_on_an_image_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", 6), ("val", 2)):
        for i, name in enumerate(("dark", "light") * count):
            path = tmp_path / "two" / split / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40 + i, 50), (40 + 160 * (i % 2), 90, 90 + i)).save(path)
    options = ["--epochs", "1", "--batch", "4", "--size", "32", "--workers", "0", "--every", "3", "--no-compile"]
    data = ["--data", str(tmp_path / "two")]
    shown = invoke("train", "--model", "resnet18", *data, *options, "--out", str(tmp_path / "out"))
    assert "images/s" in shown
    assert re.search(r": one process on (cpu|cuda:0), images of .*two", " ".join(shown.split()))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["model"], result["dataset"], result["train_images"], result["test_images"]) == ("resnet18", "two", 12, 4)
    for network, accuracy in (("before decomposition", result["top1_before_decomposition"]), ("decomposed", result["top1"])):
        assert re.search(rf"^ *{network} +{accuracy:.2f} ", shown, re.MULTILINE)
    assert (result["config"]["photographs"]["test_resize"], result["config"]["photographs"]["test_size"]) == (37, 32)
    assert result["macs_dense"] / result["macs"] > 2.19

    builder = "from rankprune.recipes.imagenet_resnet import resnet18\n\n\ndef build():\n    return resnet18(2)\n"
    (tmp_path / "users_networks.py").write_text(builder)
    monkeypatch.syspath_prepend(tmp_path)
    network = ["--model", "users_networks:build", "--artefact", str(tmp_path / "out" / "artefact")]
    shown = invoke("evaluate", *network, *data, "--size", "32", "--workers", "0")
    assert f"top-1 {result['top1']:.2f} % of 4 images" in shown
    (tmp_path / "two" / "test" / "dark").mkdir(parents=True)
    Image.new("RGB", (50, 50)).save(tmp_path / "two" / "test" / "dark" / "0.jpg")
    for split, images in ((), 4), (("--split", "test"), 1):
        shown = invoke("evaluate", *network, *data, "--size", "32", "--workers", "0", *split)
        assert f" % of {images} images" in shown
        assert "classes apart" not in shown
    (tmp_path / "part" / "val").mkdir(parents=True)
    (tmp_path / "two" / "val" / "light").rename(tmp_path / "part" / "val" / "light")  # the second class, alone
    shown = invoke("evaluate", *network, "--data", str(tmp_path / "part"), "--size", "32", "--workers", "0")
    assert "tells 2 classes apart, and these images have 1" in " ".join(shown.split())
    with pytest.raises(RankPruneError, match="--resize would do nothing: without --size"):
        invoke("evaluate", *network, *data, "--resize", "40")


def test_what_has_no_checkpoint_is_not_trained_anew_where_it_is_to_be_evaluated_again(tmp_path: Path) -> None:
    (tmp_path / "row.toml").write_text("method = 'dense'")
    weights = tmp_path / "runs" / "row" / "dense.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"kept")
    again = ["bench", "run", str(tmp_path / "row.toml"), "--again", "--runs", str(tmp_path / "runs")]
    with pytest.raises(RankPruneError, match=r"there is no '.*checkpoint\.pt'; it is trained without --again"):
        invoke(*again)
    assert weights.read_bytes() == b"kept"
    weights.rename(weights.with_name("checkpoint.pt"))  # as of a run that was interrupted
    with pytest.raises(RankPruneError, match=r"there is no '.*dense\.safetensors'; it is trained without --again"):
        invoke(*again)


def test_where_nothing_can_be_written_is_told_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("notes")
    with pytest.raises(FileExistsError):
        invoke("train", "--model", "resnet20", "--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "out"))


def test_a_result_of_another_run_is_not_written_over(tmp_path: Path) -> None:
    out, data = tmp_path / "out", ["--data", str(tmp_path / "nothing")]
    out.mkdir()
    other = {"config": asdict(Experiment("renamed", method="dense", dataset="nothing", trp=TrpConfig(freeze=0.5)))}
    (out / "result.json").write_text(json.dumps(other))
    with pytest.raises(RankPruneError, match=r"result\.json' is the result of another run.*take another folder"):
        invoke("train", *data, "--method", "decompose", "--start", "x.pth", "--out", str(out))
    assert (out / "result.json").read_text() == json.dumps(other)
    with pytest.raises(RankPruneError, match="no 'train' images under"):  # the same one, in a folder of another name
        invoke("train", *data, "--method", "dense", "--epochs", "30", "--out", str(out))


@pytest.mark.parametrize("data", [".", "../cats", str(Path("x") / ".." / ".." / "cats")])
def test_images_are_called_after_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    (tmp_path / "cats" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cats")
    ran = []
    monkeypatch.setattr("rankprune.cli.train.run", lambda e, *rest: ran.append(e))
    invoke("train", "--data", data, "--out", str(tmp_path / "out"), "--start", "12:30/model.pt")
    assert ran[0].dataset == "cats"
    assert ran[0].start == str((tmp_path / "cats" / "12:30" / "model.pt").resolve())


@pytest.mark.parametrize(("there", "name"), [("cifar10", "cifar10"), ("train", "flowers")])
def test_images_of_the_environment_are_called_after_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, name: str
) -> None:
    (tmp_path / "flowers" / there).mkdir(parents=True)
    monkeypatch.setenv("RANKPRUNE_DATA", str(tmp_path / "flowers"))
    ran = []
    monkeypatch.setattr("rankprune.cli.train.run", lambda e, *rest: ran.append(e))
    invoke("train", "--out", str(tmp_path / "out"))
    assert ran[0].dataset == name
    with pytest.raises(RankPruneError, match="say with --data where they are"):
        invoke("train", "--model", "resnet18", "--out", str(tmp_path / "out"))


def test_one_process_tells_that_a_row_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "row.toml").write_text('method = "dense"\n')
    monkeypatch.setattr("rankprune.cli.train.finished", lambda *_: True)
    monkeypatch.setenv("RANK", "1")
    assert not invoke("bench", "run", str(tmp_path / "row.toml"))
    monkeypatch.setenv("RANK", "0")
    assert "was there" in invoke("bench", "run", str(tmp_path / "row.toml"))


def test_a_finished_row_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKPRUNE_DATA", str(tmp_path / "nothing"))
    file, weights, result = tmp_path / "row.toml", tmp_path / "row" / "dense.safetensors", tmp_path / "row.json"
    file.write_text('method = "dense"\n')
    weights.parent.mkdir()
    config = asdict(Experiment.read(file))
    save_tensors(weights, nn.Linear(1, 1), {"settings": json.dumps(config)})
    (weights.parent / "checkpoint.pt").touch()
    result.write_text(json.dumps({"config": config, "top1_dense": 1.0}))
    folders = ["--results", str(tmp_path), "--runs", str(tmp_path)]
    before = result.read_text()
    assert "was there; --again" in invoke("bench", "run", str(file), *folders)
    assert result.read_text() == before
    for again in (["--again"], ["--seed", "1"]):
        with pytest.raises(RankPruneError, match="no 'train' images under"):
            invoke("bench", "run", str(file), *folders, *again)


def test_drafts_are_deleted_where_a_scheduler_ends_the_process(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time\n"
        "from rankprune import cli\n"
        "from rankprune.cli import app\n"
        "from rankprune.files import draft_of\n"
        "def run():\n"
        "    with draft_of(__import__('pathlib').Path(sys.argv[1])) as draft:\n"
        "        draft.write_text('half')\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "app.app = run\n"
        "cli.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "result.json")], timeout=120)
    assert ended.returncode == 143
    assert not list(tmp_path.iterdir())
