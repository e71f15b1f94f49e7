"""rankprune train on photographs."""

import json
from pathlib import Path

import pytest

app = pytest.importorskip("rankprune.cli.app", exc_type=ImportError).app
Image = pytest.importorskip("PIL.Image")
CliRunner = pytest.importorskip("typer.testing").CliRunner


def test_train_resnet18_on_an_image_folder(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2)):
        for i, name in enumerate(("dark", "light") * count):
            path = tmp_path / "two" / split / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40 + i, 50), (40 + 160 * (i % 2), 90, 90 + i)).save(path)
    options = ["--epochs", "1", "--batch", "4", "--size", "32", "--workers", "0", "--every", "3", "--no-compile"]
    command = ["train", "--model", "resnet18", "--data", str(tmp_path / "two"), *options, "--out", str(tmp_path / "out")]
    outcome = CliRunner().invoke(app, command, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert "images/s" in outcome.output
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["model"], result["dataset"], result["train_images"], result["test_images"]) == ("resnet18", "two", 12, 4)
    assert (result["config"]["photographs"]["test_resize"], result["config"]["photographs"]["test_size"]) == (37, 32)
    assert result["macs_dense"] / result["macs"] > 2.19
