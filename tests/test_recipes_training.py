"""The training loop and experiments: they learn, resume to the bit, and report on what they saved."""

import copy
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankprune as rp
from rankprune.checkpoint import load_exactly, read_tensors
from rankprune.recipes.batches import TrainBatches, eval_batches
from rankprune.recipes.evaluation import top1
from rankprune.recipes.experiment import Experiment, Folders, TrpConfig
from rankprune.recipes.images import ImageSet, load_images
from rankprune.recipes.resnet import resnet
from rankprune.recipes.runner import run, write
from rankprune.recipes.training import Progress, TrainConfig, learning_rate, loss_of, train

CONFIG = TrainConfig(epochs=3, lr=0.05, precision="float32", compile=False)


def coloured(count: int, size: int = 6, seed: int = 0) -> ImageSet:
    """Noise around one of four colours, which is the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    colours = torch.tensor([[60, 60, 60], [190, 60, 60], [60, 190, 60], [60, 60, 190]])
    noise = torch.randint(-50, 50, (count, size, size, 3), generator=generator)
    images = (colours[labels][:, None, None] + noise).to(torch.uint8)
    return ImageSet(images, labels, ("grey", "red", "green", "blue"))


def network(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 32),
        nn.Dropout(dropout),
        nn.Linear(32, 4),
    ).to(memory_format=torch.channels_last)


def batches(size: int = 16, **options: Any) -> TrainBatches:
    return TrainBatches(coloured(70), size, pad=1, **options)


def pruning(model: nn.Module, **options: Any) -> rp.TRP:
    x = torch.zeros(1, 3, 6, 6)
    settings = {"rule": rp.Budget(macs=0.6), "every": 3, "nuclear": 3e-3, "ramp": 6, "freeze": 9, "example_inputs": x}
    return rp.TRP(model, **{**settings, **options})


def exactly_same(a: nn.Module, b: nn.Module) -> None:
    different = [n for (n, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True) if not x.equal(y)]
    assert not different


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns(pruned: bool, precision: str) -> None:
    model, test = network(), coloured(40, seed=5)
    before = top1(model, eval_batches(test))
    trp = pruning(model) if pruned else None
    log = train(model, batches(), replace(CONFIG, epochs=8, lr=0.1, precision=precision), trp=trp)
    assert [entry.epoch for entry in log] == list(range(8))
    assert log[-1].loss < 0.3 * log[0].loss
    assert before < 60 < 90 < top1(model, eval_batches(test))
    assert log[-1].ranks == (trp.plan.ranks if trp else {})
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_equals_a_loop_written_by_hand() -> None:
    model, theirs = network(), network()
    config = replace(CONFIG, warmup_steps=2)
    log = train(model, batches(), config)
    velocity = [torch.zeros_like(p) for p in theirs.parameters()]
    losses = []
    for step, (images, labels) in enumerate(b for epoch in range(3) for b in batches().epoch(epoch)):
        lr = 0.05 * (step + 1) / 2 if step < 2 else 0.05 * (1 + math.cos(math.pi * (step - 2) / 10)) / 2
        loss = F.cross_entropy(theirs(images), labels)
        gradients = torch.autograd.grad(loss, list(theirs.parameters()))
        with torch.no_grad():
            for p, g, v in zip(theirs.parameters(), gradients, velocity, strict=True):
                g = g + 1e-4 * p
                v.mul_(0.9).add_(g)
                p.sub_(lr * (g + 0.9 * v))
        losses.append(loss.item())
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert [entry.loss for entry in log] == pytest.approx([sum(losses[i : i + 4]) / 4 for i in (0, 4, 8)], rel=1e-4)


class KilledError(Exception):
    pass


def kill_in_epoch(number: int) -> Callable[[Progress], None]:
    def on_step(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (number, 2):
            raise KilledError

    return on_step


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("pruned", [False, True])
def test_killed_and_called_again_is_uninterrupted(tmp_path: Path, pruned: bool, dropout: float) -> None:
    def call(seed: int, checkpoint: Path | None, on_step: Callable | None = None) -> tuple:
        model = network(seed, dropout)
        trp = pruning(model) if pruned else None
        return model, train(model, batches(seed=4), CONFIG, trp=trp, checkpoint=checkpoint, on_step=on_step), trp

    whole, log, trp = call(0, None)
    expected = copy.deepcopy(whole)  # finalize projects, and changes weights by rounding
    path = tmp_path / "runs" / "checkpoint.pt"
    with pytest.raises(KilledError):
        call(0, path, kill_in_epoch(1))
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]
    torch.rand(3)
    resumed, log2, trp2 = call(1, path)
    exactly_same(resumed, whole)
    assert [(e.epoch, e.loss, e.ranks) for e in log2] == [(e.epoch, e.loss, e.ranks) for e in log]
    if trp:
        assert (trp2.steps, trp2.plan, trp2.history) == (12, trp.plan, trp.history)
        exactly_same(trp2.finalize(), trp.finalize())
    steps: list[Progress] = []
    again, log3, _ = call(2, path, steps.append)  # finished: nothing is left to do
    exactly_same(again, expected)
    assert (log3, steps) == (log2, [])


def test_trp_is_detached_also_when_training_is_interrupted() -> None:
    model = network()
    trp = pruning(model)
    with pytest.raises(KilledError):
        train(model, batches(), CONFIG, trp=trp, on_step=kill_in_epoch(0))
    trp.attach(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = network()
    train(model, batches(), replace(CONFIG, epochs=1), trp=pruning(model), checkpoint=tmp_path / "c.pt")
    return tmp_path / "c.pt"


OTHER = {
    "learning rate": {"config": replace(CONFIG, epochs=1, lr=0.1)},
    "epochs": {"config": replace(CONFIG, epochs=2)},
    "no pruning": {"trp": None},
    "other rule": {"trp": {"rule": rp.Energy(0.9)}},
    "other period": {"trp": {"every": 4}},
    "other nuclear weight": {"trp": {"nuclear": 0.0}},
    "other batch": {"batches": {"size": 32}},
    "other order": {"batches": {"seed": 1}},
}


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER)
def test_checkpoint_of_another_config_is_refused(checkpoint: Path, other: dict) -> None:
    model = network()
    settings = {"config": replace(CONFIG, epochs=1), "trp": {}, "batches": {}, **other}
    trp = None if settings["trp"] is None else pruning(model, **settings["trp"])
    data = batches(**settings["batches"])
    with pytest.raises(rp.CheckpointError, match=r"c\.pt.*another"):
        train(model, data, settings["config"], trp=trp, checkpoint=checkpoint)
    exactly_same(model, network())


@pytest.mark.parametrize("content", [b"", b"no checkpoint", {"conv.weight": torch.zeros(2)}, [1, 2]], ids=str)
def test_damaged_or_foreign_checkpoint(tmp_path: Path, content: object) -> None:
    if isinstance(content, bytes):
        (tmp_path / "c.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "c.pt")
    with pytest.raises(rp.CheckpointError, match=r"c\.pt"):
        train(network(), batches(), CONFIG, checkpoint=tmp_path / "c.pt")


def test_on_step_sees_every_step() -> None:
    seen: list[Progress] = []
    train(network(), batches(), CONFIG, on_step=seen.append)
    assert [(p.epoch, p.step, p.steps_per_epoch) for p in seen] == [(e, s, 4) for e in range(3) for s in range(1, 5)]
    assert [p.lr for p in seen] == [learning_rate(CONFIG, i, 12) for i in range(12)]
    assert all(p.loss.shape == () and not p.loss.requires_grad for p in seen)


def test_learning_rate() -> None:
    config = TrainConfig(lr=0.4, warmup_steps=4)
    assert [learning_rate(config, s, 104) for s in (0, 1, 3)] == pytest.approx([0.1, 0.2, 0.4])
    assert [learning_rate(config, s, 104) for s in (4, 54, 104)] == pytest.approx([0.4, 0.2, 0.0])
    falling = [learning_rate(config, s, 104) for s in range(4, 105)]
    assert falling == sorted(falling, reverse=True)
    assert learning_rate(TrainConfig(lr=0.4), 0, 0) == 0.4


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: TrainConfig(epochs=-1), "epochs=-1"),
        (lambda: TrainConfig(lr=0.0), r"lr=0\.0"),
        (lambda: train(network(), batches(128), CONFIG), "70 images do not fill one batch of 128"),
        (lambda: train(network(), batches(), replace(CONFIG, lr=1e30)), "lower the learning rate"),
        (lambda: resnet("resnet21"), "unknown model 'resnet21'; choose one of resnet20"),
        (lambda: Experiment("e", method="prune"), "method='prune'"),
        (lambda: Experiment("e", method="decompose"), "run:NAME"),
        (lambda: Experiment("e", method="trp+nu"), r"trp\.nuclear"),
    ],
)
def test_bad_values_are_named(build: Callable, said: str) -> None:
    with pytest.raises(rp.RankPruneError, match=said):
        build()


def test_top1_leaves_the_model_alone() -> None:
    model = network().train()
    before = copy.deepcopy(model)
    images = torch.randn(4, 3, 6, 6)
    labels = model.eval()(images).argmax(1)
    model.train()
    assert top1(model, [(images, labels), (images, (labels + 1) % 4)]) == 50
    assert model.training
    exactly_same(model, before)


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
        ("colour = 1", r"quick\.toml.*unknown fields \['colour'\].*known ones are name, method"),
        ("[training]\nlearning = 1", r"\['learning'\].*epochs"),
        ("[trp]\nrang = 1", r"\['rang'\].*rule"),
        ("batch = = 3", r"cannot read.*quick\.toml"),
        ('method = "other"', "method='other'"),
    ],
)
def test_bad_toml(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "quick.toml").write_text(text)
    with pytest.raises(rp.RankPruneError, match=said):
        Experiment.read(tmp_path / "quick.toml")
    with pytest.raises(rp.RankPruneError, match="nowhere"):
        Experiment.read(tmp_path / "nowhere.toml")


def write_parquet(path: Path, data: ImageSet) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")

    def png(picture: Tensor) -> dict:
        image.fromarray(picture.numpy()).save(buffer := io.BytesIO(), "png")
        return {"bytes": buffer.getvalue(), "path": None}

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table({"img": [png(p) for p in data.images], "label": data.labels.tolist()}), path)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    write_parquet(tmp_path / "data" / "tiny" / "train-0.parquet", coloured(48, 8))
    write_parquet(tmp_path / "data" / "tiny" / "test-0.parquet", coloured(30, 8, seed=5))
    return Folders(tmp_path / "data", tmp_path / "models", tmp_path / "runs")


ALWAYS = {
    *("name", "model", "dataset", "method", "scheme", "epochs", "seed", "train_images", "test_images", "test_split"),
    *("wall_s", "log", "config", "commit", "versions", "cpu", "gpu", "threads", "date", "macs_dense", "params_dense"),
}
DECOMPOSED = {
    *("top1_before_decomposition", "top1", "macs", "params", "ms_dense", "ms", "ms_batch", "ms_spread", "ranks"),
    "spectra",
}
TINY = Experiment("tiny", dataset="tiny", batch=16, training=TrainConfig(epochs=1, lr=0.02, compile=False))


def test_experiments_end_to_end(folders: Folders, tmp_path: Path) -> None:
    pruned = TrpConfig(every=2, ramp=0.5)
    experiments = [
        replace(TINY, name="dense", method="dense"),
        replace(TINY, name="trp", trp=pruned),
        replace(TINY, name="nu", method="trp+nu", trp=replace(pruned, nuclear=3e-3)),
        replace(TINY, name="plain", method="decompose", start="run:dense"),
        replace(TINY, name="tuned", method="decompose+finetune", start="run:dense"),
        replace(TINY, name="ours", method="ours", start="run:dense", training=replace(TINY.training, distill=0.7), trp=pruned),
    ]
    experiments[-1] = replace(experiments[-1], teacher="run:trp", reference="run:dense")
    results = {e.name: run(e, folders) for e in experiments}
    test = load_images(folders.data / "tiny", "test")
    for e in experiments:
        result = results[e.name]
        saved = json.loads(write(result, tmp_path / "results").read_text())
        assert saved == json.loads(json.dumps(result))
        extra = {"top1_dense"} if e.method == "dense" else DECOMPOSED | ({"top1_dense"} if e.reference else set())
        assert saved.keys() == ALWAYS | extra
        assert (saved["name"], saved["method"]) == (e.name, e.method)
        assert (saved["train_images"], saved["test_images"], saved["test_split"]) == (48, 30, "test")
        assert saved["macs_dense"] == (40_551_040 - 640) // 16 + 64 * 4  # a sixteenth of the pixels, four classes
        if e.method != "dense":
            small = rp.load(folders.runs / e.name / "artefact", resnet("resnet20", 4))
            assert top1(small, eval_batches(test)) == saved["top1"]
            assert rp.count(small, torch.zeros(1, 3, 8, 8)).macs == saved["macs"] <= saved["macs_dense"] / 2.2
            assert saved["macs"] > 0.98 * saved["macs_dense"] / 2.2
    assert [len(results[name]["log"]) for name in results] == [1, 1, 1, 0, 1, 1]
    assert results["trp"]["top1"] == results["trp"]["top1_before_decomposition"]
    assert results["ours"]["top1_dense"] == results["dense"]["top1_dense"]
    for name, ranks in results["trp"]["ranks"].items():
        before, after = (results["trp"]["spectra"][when][name] for when in ("before", "after"))
        assert before[0] == after[0] == 1.0
        assert before[ranks] > 1e-3 > 1e-5 > after[ranks], "the tail is gone"
    dense, plain = (read_tensors(folders.runs / name / "dense.safetensors") for name in ("dense", "plain"))
    assert all(torch.equal(dense[name], plain[name]) for name in dense)
    assert results["plain"]["top1_before_decomposition"] == results["dense"]["top1_dense"]
    tuned = read_tensors(folders.runs / "tuned" / "artefact" / "model.safetensors")
    plain = read_tensors(folders.runs / "plain" / "artefact" / "model.safetensors")
    assert tuned.keys() == plain.keys()
    assert not torch.equal(tuned["layer1.0.conv1.0.weight"], plain["layer1.0.conv1.0.weight"])


def test_an_experiment_run_again_gives_the_same(folders: Folders) -> None:
    e = replace(TINY, name="again", training=replace(TINY.training, epochs=2), trp=TrpConfig(every=2))
    with pytest.raises(KilledError):
        run(e, folders, kill_in_epoch(1))
    results = [run(e, folders), run(e, folders)]
    apart = run(replace(e, name="apart"), folders)
    for result in results:
        for key in ("top1", "top1_before_decomposition", "macs", "ranks"):
            assert result[key] == apart[key]
    ours, theirs = (read_tensors(folders.runs / name / "artefact" / "model.safetensors") for name in ("again", "apart"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_holdout_takes_the_place_of_the_test_split(folders: Folders) -> None:
    result = run(replace(TINY, method="dense", holdout=8), folders)
    assert (result["train_images"], result["test_images"], result["test_split"]) == (40, 8, "holdout")


def test_start_from_a_file_and_what_is_missing(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(rp.RankPruneError, match="run that experiment first"):
        run(replace(TINY, start="run:other"), folders)
    with pytest.raises(rp.CheckpointError, match=r"start\.th"):
        run(replace(TINY, start="start.th"), folders)
    with pytest.raises(rp.RankPruneError, match="no 'train' images under"):
        run(replace(TINY, dataset="other"), replace(folders, data=tmp_path / "empty"))
    folders.models.mkdir()
    start = resnet("resnet20", 4)
    torch.save({"state_dict": {f"module.{n}": v for n, v in start.state_dict().items()}}, folders.models / "start.th")
    run(replace(TINY, method="decompose", start="start.th"), folders)
    used = resnet("resnet20", 4)
    load_exactly(used, read_tensors(folders.runs / "tiny" / "dense.safetensors"), "x")
    exactly_same(used, start)


def test_folders_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKPRUNE_DATA", str(tmp_path / "d"))
    assert Folders.from_environment("r") == Folders(tmp_path / "d", tmp_path / "models", Path("r"))
    (tmp_path / "d" / "models").mkdir(parents=True)
    assert Folders.from_environment().models == tmp_path / "d" / "models"


def test_another_seed_builds_on_the_runs_of_that_seed() -> None:
    e = replace(
        TINY,
        method="ours",
        start="file.th",
        teacher="run:dense",
        reference="run:dense",
        training=replace(TINY.training, distill=0.5),
    )
    assert e.with_seed(0) is e
    other = e.with_seed(2)
    assert (other.name, other.start, other.teacher, other.training.seed) == ("tiny-seed2", "file.th", "run:dense-seed2", 2)
    assert other.reference == "run:dense-seed2"
    with pytest.raises(rp.RankPruneError, match="teaches nothing"):
        replace(e, training=TINY.training)


def test_distillation_mixes_labels_with_the_teachers_softened_answers() -> None:
    logits, answers, labels = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 4
    config = replace(CONFIG, distill=0.7, temperature=4.0)
    p, q = (answers / 4).softmax(1), (logits / 4).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = 0.3 * F.cross_entropy(logits, labels) + 0.7 * 16 * divergence
    torch.testing.assert_close(loss_of(logits, labels, answers, config), expected)
    torch.testing.assert_close(loss_of(logits, labels, None, config), F.cross_entropy(logits, labels))


def test_a_teacher_is_left_alone_and_taught_from_as_it_was_at_the_start() -> None:
    model, plain = network(), network()
    before = copy.deepcopy(model)
    config = replace(CONFIG, distill=1.0, epochs=1)
    train(model, batches(), config, teacher=model)
    train(plain, batches(), config, teacher=before)
    exactly_same(model, plain)
    assert before.training
    assert all(p.requires_grad for p in before.parameters())


@pytest.mark.parametrize("wrong", [{"distill": 1.5}, {"distill": -0.1}, {"temperature": 0.0}])
def test_distillation_out_of_range(wrong: dict) -> None:
    with pytest.raises(rp.RankPruneError, match=str(next(iter(wrong.values())))):
        replace(CONFIG, **wrong)
    with pytest.raises(rp.RankPruneError, match="needs a teacher"):
        train(network(), batches(), replace(CONFIG, distill=0.5))
