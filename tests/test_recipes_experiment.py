"""Experiments: what a config says, and where things are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import rankprune as rp
from rankprune.recipes.experiment import Experiment, Folders, TrpConfig
from rankprune.recipes.schedule import TrainConfig
from rankprune.report.results import without_seed
from rankprune.schemes import CHOICES


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Experiment("e", method="prune"), "method='prune'"),
        (lambda: Experiment("e", method="decompose"), "run:NAME"),
        (lambda: Experiment("e", method="trp+nu"), "nuclear=0.0: .* needs one"),
    ],
)
def test_bad_experiments_are_named(build: Callable, said: str) -> None:
    with pytest.raises(rp.RankPruneError, match=said):
        build()


TOML = """
method = "trp+nu"
start = "resnet20.th"
batch = 64
[training]
epochs = 2
compile = false
[trp]
rule = "Energy(keep=0.9)"
nuclear = 3e-4
"""


def test_experiment_from_toml(tmp_path: Path) -> None:
    (tmp_path / "quick.toml").write_text(TOML)
    e = Experiment.read(tmp_path / "quick.toml")
    assert e == Experiment(
        "quick",
        method="trp+nu",
        start="resnet20.th",
        batch=64,
        training=TrainConfig(epochs=2, compile=False),
        trp=TrpConfig(rule="Energy(keep=0.9)", nuclear=3e-4),
    )
    assert e.with_seed(0) == e
    assert (e.with_seed(3).name, e.with_seed(3).training.seed) == ("quick-seed3", 3)
    assert replace(e.with_seed(3), name="quick", training=e.training) == e


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# caf\xe9", "cannot read the experiment"),
        ("colour = 1", r"quick\.toml.*unknown fields \['colour'\].*known ones are name, method"),
        ("[training]\nlearning = 1", r"\['learning'\].*epochs"),
        ("[trp]\nrang = 1", r"\['rang'\].*rule"),
        ("[trp]\nscheme = 'tucker'", f"unknown scheme 'tucker'; choose one of {', '.join(CHOICES)}"),
        ("batch = = 3", r"cannot read.*quick\.toml"),
        ('method = "other"', "method='other'"),
        ("[photographs]\nzoom = 2", r"\['zoom'\].*sources, sizes"),
        ('[photographs]\nsources = "imagenet"', "sources = 'imagenet' is of the wrong type"),
        ("[photographs]\nsizes = [64, 9.5]", r"sizes = \[64, 9\.5\] is of the wrong type"),
        ("[training]\nepochs = 'ten'", "epochs = 'ten' is of the wrong type"),
        ("[training]\ncompile = 1", "compile = 1 is of the wrong type"),
        ("[trp]\nevery = true", "every = True is of the wrong type"),
        ("batch = 2.5", "batch = 2.5 is of the wrong type"),
        ("training = 3", "3 stands where a table is expected, with fields of TrainConfig"),
    ],
)
def test_bad_toml(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "quick.toml").write_bytes(text.encode("latin-1"))  # which but for one is UTF-8, too
    with pytest.raises(rp.RankPruneError, match=said):
        Experiment.read(tmp_path / "quick.toml")
    with pytest.raises(rp.RankPruneError, match="nowhere"):
        Experiment.read(tmp_path / "nowhere.toml")


def test_folders_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKPRUNE_DATA", str(tmp_path / "d"))
    assert Folders.from_environment("r") == Folders(tmp_path / "d", tmp_path / "models", Path("r"))
    (tmp_path / "d" / "models").mkdir(parents=True)
    assert Folders.from_environment().models == tmp_path / "d" / "models"
    (tmp_path / "sets").mkdir()
    monkeypatch.chdir(tmp_path / "sets")
    monkeypatch.setenv("RANKPRUNE_DATA", ".")
    assert Folders.from_environment().models.resolve() == tmp_path.resolve() / "models"
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "sets", target_is_directory=True)
    monkeypatch.setenv("RANKPRUNE_DATA", str(tmp_path / "here" / "link"))
    assert Folders.from_environment().models == tmp_path / "here" / "models"


def test_another_seed_builds_on_the_runs_of_that_seed() -> None:
    tiny = Experiment("tiny", dataset="tiny")
    e = replace(
        tiny,
        method="ours",
        start="file.th",
        teacher="run:dense",
        reference="run:dense",
        training=replace(tiny.training, distill=0.5),
    )
    assert e.with_seed(0) is e
    other = e.with_seed(2)
    assert (other.name, other.start, other.teacher, other.training.seed) == ("tiny-seed2", "file.th", "run:dense-seed2", 2)
    assert other.reference == "run:dense-seed2"
    three = ("run:dense", "run:dense-seed1", "run:dense-seed2")
    assert replace(e, teacher=three).with_seed(2).teachers == three
    with pytest.raises(rp.RankPruneError, match="teacher_model='resnet56' has no weights"):
        Experiment("x", start="file.th", teacher_model="resnet56", training=TrainConfig(distill=0.5))
    with pytest.raises(rp.RankPruneError, match="teaches nothing"):
        replace(e, training=tiny.training)
    with pytest.raises(rp.RankPruneError, match="method 'decompose' trains nothing; leave distill out"):
        replace(e, method="decompose")
    with pytest.raises(rp.RankPruneError, match="'dense' is compared with nothing; leave reference out"):
        replace(e, method="dense")


def test_the_experiment_in_the_documentation_can_be_read(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    (tmp_path / "row.toml").write_text(page.split("```toml\n")[1].split("```")[0])
    e = Experiment.read(tmp_path / "row.toml")
    row = Path(__file__).parent.parent / "benchmarks" / "experiments" / "imagenette-resnet18-ours-spatial-2.23x-distilled.toml"
    assert replace(e, name=row.stem) == Experiment.read(row)


ROWS = sorted(
    path for kind in ("experiments", "choices") for path in Path(__file__).parents[1].glob(f"benchmarks/{kind}/*.toml")
)


@pytest.mark.parametrize("path", ROWS, ids=[path.stem for path in ROWS])
def test_every_row_can_be_read_and_builds_on_rows_that_are_there(path: Path) -> None:
    e = Experiment.read(path)
    assert (e.photographs is not None) == (e.model in ("resnet18", "resnet50"))
    for source in filter(None, (e.start, *e.teachers, e.reference)):
        assert not source.startswith("run:") or path.with_name(f"{without_seed(source[4:])}.toml") in ROWS
