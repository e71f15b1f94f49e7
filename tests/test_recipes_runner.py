"""Runs of experiments, from images to the JSON, which reports on what was saved."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import own_clock
import rankprune as rp
from coloured import coloured, write_parquet
from rankprune.projection import planned_spectra
from rankprune.recipes import record, runner
from rankprune.recipes.batches import eval_batches
from rankprune.recipes.evaluation import top1
from rankprune.recipes.experiment import Experiment, Folders, TrpConfig
from rankprune.recipes.images import load_images
from rankprune.recipes.networks import build
from rankprune.recipes.photograph_batches import PhotographConfig
from rankprune.recipes.processes import Processes
from rankprune.recipes.progress import Progress
from rankprune.recipes.record import finished, write
from rankprune.recipes.resnet import resnet
from rankprune.recipes.runner import run
from rankprune.recipes.schedule import TrainConfig
from rankprune.state_dicts import load_exactly, read_tensors


class KilledError(Exception):
    pass


def killed_in_the_second_epoch(progress: Progress) -> None:
    if (progress.epoch, progress.step) == (1, 2):
        raise KilledError


def exactly_same(a: nn.Module, b: nn.Module) -> None:
    different = [n for (n, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True) if not x.equal(y)]
    assert not different


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    write_parquet(tmp_path / "data" / "tiny" / "train-0.parquet", coloured(48, 8))
    write_parquet(tmp_path / "data" / "tiny" / "test-0.parquet", coloured(30, 8, seed=5))
    return Folders(tmp_path / "data", tmp_path / "models", tmp_path / "runs")


ALWAYS = {
    *("name", "model", "dataset", "method", "scheme", "epochs", "seed", "train_images", "test_images", "test_split"),
    *("source", "test_digest", "config", "commit", "versions", "cpu", "gpu", "processes", "threads", "date", "wall_s", "log"),
    *("macs_dense", "params_dense"),
    *("top1_before_decomposition", "top1", "macs", "params", "ms_dense", "ms", "ms_backend", "ms_threads", "ms_batch"),
    "ms_device",
    "ms_spread",
}
DECOMPOSED = {"ranks", "plan", "spectra"}
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
        extra = (
            {"top1_dense"}
            if e.method == "dense"
            else DECOMPOSED | ({"top1_dense"} if e.reference or "decompose" in e.method else set())
        )
        extra |= {"top1_before_finetuning"} if e.method == "decompose+finetune" else set()
        assert saved.keys() == ALWAYS | extra
        assert (saved["name"], saved["method"]) == (e.name, e.method)
        assert (saved["train_images"], saved["test_images"], saved["test_split"]) == (48, 30, "test")
        assert saved["macs_dense"] == (40_551_040 - 640) // 16 + 64 * 4  # a sixteenth of the pixels, four classes
        if e.method == "dense":
            for figure in ("macs", "params", "ms"):
                assert saved[figure] == saved[f"{figure}_dense"] > 0
            assert saved["top1"] == saved["top1_before_decomposition"] == saved["top1_dense"]
        else:
            small = rp.load(folders.runs / e.name / "artefact", resnet("resnet20", 4))
            assert top1(small, eval_batches(test)) == saved["top1"]
            assert rp.count(small, torch.zeros(1, 3, 8, 8)).macs == saved["macs"] <= saved["macs_dense"] / 2.2
            assert saved["macs"] > 0.98 * saved["macs_dense"] / 2.2
    assert [len(results[name]["log"]) for name in results] == [1, 1, 1, 0, 1, 1]
    assert results["trp"]["top1"] == results["trp"]["top1_before_decomposition"]
    assert results["ours"]["top1_dense"] == results["dense"]["top1_dense"]
    for name in ("plain", "tuned"):
        assert results[name]["top1_before_decomposition"] == results[name]["top1_dense"] == results["dense"]["top1_dense"]
    assert results["tuned"]["top1_before_finetuning"] == results["plain"]["top1"]
    for result in (results["trp"], results["plain"], results["tuned"]):
        for name, rank in result["ranks"].items():
            before, after = (result["spectra"][when][name] for when in ("before", "after"))
            assert before[0] == after[0] == 1.0
            assert before[rank] > 1e-3 > 1e-5 > after[rank], "the tail is gone"
    torch.manual_seed(TINY.training.seed)
    fresh = planned_spectra(resnet("resnet20", 4), rp.Plan.from_json(json.dumps(results["trp"]["plan"])))
    for name, values in results["trp"]["spectra"]["before"].items():
        assert values == pytest.approx(fresh[name], rel=0.01), "of the network that was trained, before it was"
    dense, plain = (read_tensors(folders.runs / name / "dense.safetensors") for name in ("dense", "plain"))
    assert all(torch.equal(dense[name], plain[name]) for name in dense)
    assert results["plain"]["top1_before_decomposition"] == results["dense"]["top1_dense"]
    tuned = read_tensors(folders.runs / "tuned" / "artefact" / "model.safetensors")
    plain = read_tensors(folders.runs / "plain" / "artefact" / "model.safetensors")
    assert tuned.keys() == plain.keys()
    assert not torch.equal(tuned["layer1.0.conv1.0.weight"], plain["layer1.0.conv1.0.weight"])


def test_a_run_trains_by_its_settings_and_learns_from_its_teacher(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.models.mkdir()
    for seed, name in enumerate(("start.th", "teacher.th")):
        torch.manual_seed(seed + 7)
        torch.save(resnet("resnet20", 4).state_dict(), folders.models / name)
    training = replace(TINY.training, epochs=4, distill=0.4, weight_decay=3e-4)
    settings = TrpConfig("Energy(0.7)", "channel", every=2, ramp=0.25, freeze=0.5, nuclear=2e-3, nuclear_cadence="projection")
    made, trained = [], []
    pruning, train = runner.TRP, runner.train
    monkeypatch.setattr(runner, "TRP", lambda model, **given: made.append(given) or pruning(model, **given))
    monkeypatch.setattr(runner, "train", lambda model, **given: trained.append(given) or train(model, **given))
    e = replace(TINY, method="trp+nu", start="start.th", teacher="teacher.th", training=training, trp=settings)
    result = run(e, folders)
    given = {name: value for name, value in made[0].items() if name != "example_inputs"}
    steps = {"every": 2, "ramp": 3, "freeze": 6, "nuclear": 2e-3, "nuclear_cadence": "projection"}  # of 12
    assert given == {"rule": rp.Energy(0.7), "scheme": "channel", **steps}
    assert result["config"]["trp"]["nuclear"] == 2e-3
    assert trained[0]["config"] == training
    taught = torch.load(folders.models / "teacher.th")
    assert all(torch.equal(value, taught[name]) for name, value in trained[0]["teacher"].state_dict().items())
    trained.clear()
    torch.save(resnet("resnet32", 4).state_dict(), folders.models / "deeper.th")
    run(replace(e, name="by another network", teacher="deeper.th", teacher_model="resnet32"), folders)
    taught = torch.load(folders.models / "deeper.th")
    assert all(torch.equal(value, taught[name]) for name, value in trained[0]["teacher"].state_dict().items())
    trained.clear()
    run(replace(e, name="by several", teacher=["start.th", "teacher.th"]), folders)
    taught = [torch.load(folders.models / name) for name in ("start.th", "teacher.th")]
    members = trained[0]["teacher"].members
    assert all(torch.equal(v, taught[i][name]) for i, m in enumerate(members) for name, v in m.state_dict().items())
    trained.clear()
    run(replace(e, name="by the start", teacher=None), folders)
    begun = torch.load(folders.models / "start.th")
    assert all(torch.equal(value, begun[name]) for name, value in trained[0]["teacher"].state_dict().items())


def test_each_epoch_says_what_computed_it(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    e = replace(TINY, method="dense", training=replace(TINY.training, epochs=2))
    monkeypatch.setattr(record, "commit", lambda: "first")
    with pytest.raises(KilledError):
        run(e, folders, killed_in_the_second_epoch)
    monkeypatch.setattr(record, "commit", lambda: "second")
    result = run(e, folders)
    assert [entry["by"].split(", ")[0] for entry in result["log"]] == ["first", "second"]
    assert result["commit"] == "second"


def test_an_experiment_run_again_gives_the_same(folders: Folders) -> None:
    e = replace(TINY, name="again", training=replace(TINY.training, epochs=2), trp=TrpConfig(every=2))
    with pytest.raises(KilledError):
        run(e, folders, killed_in_the_second_epoch)
    results = [run(e, folders), run(e, folders)]
    apart = run(replace(e, name="apart"), folders)
    for result in results:
        for key in ("top1", "top1_before_decomposition", "macs", "ranks"):
            assert result[key] == apart[key]
    ours, theirs = (read_tensors(folders.runs / name / "artefact" / "model.safetensors") for name in ("again", "apart"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_finetuning_goes_on_with_the_plan_it_began_with(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.models.mkdir()
    torch.save(resnet("resnet20", 4).state_dict(), folders.models / "start.th")
    two = replace(TINY, method="decompose+finetune", start="start.th", training=replace(TINY.training, epochs=2))
    begun = replace(two, name="begun", trp=TrpConfig(rule="Energy(0.7)"))
    with pytest.raises(KilledError):
        run(begun, folders, killed_in_the_second_epoch)
    with pytest.raises(rp.CheckpointError, match=r"another config.*Energy\(keep=0\.7\)"):
        run(replace(begun, trp=TrpConfig(rule="Energy(0.6)")), folders)
    planned = runner.make_plan
    monkeypatch.setattr(runner, "make_plan", lambda *given, **more: planned(*given, **more | {"rule": rp.FixedRank(1)}))
    result = run(begun, folders)
    assert min(result["ranks"].values()) > 1
    assert set(run(replace(begun, name="other"), folders)["ranks"].values()) == {1}
    assert set(run(replace(begun, name="plain", method="decompose"), folders)["ranks"].values()) == {1}, "which trains nothing"


def test_a_network_under_a_budget_of_latency_is_timed_on_the_batch_of_the_budget(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_clock.use(monkeypatch)
    own_clock.add(monkeypatch, own_clock.TimedEager())
    folders.models.mkdir()
    torch.save(resnet("resnet20", 4).state_dict(), folders.models / "start.th")
    e = replace(TINY, method="decompose", start="start.th", trp=TrpConfig(rule="Budget(latency=0.5, backend='eager')"))
    for batch in (None, 8):
        result = run(replace(e, trp=replace(e.trp, batch=batch)), folders)
        assert result["ms_batch"] == (batch or 1)
        assert result["ms_threads"] == torch.get_num_threads()
        assert result["ms"] == pytest.approx(result["plan"]["ms_measured"], rel=1e-3)
        assert result["ms"] <= 0.5 * result["ms_dense"]


def test_of_a_reference_run_elsewhere_the_result_is_enough(folders: Folders, tmp_path: Path) -> None:
    e = replace(TINY, name="row", trp=TrpConfig(every=2), reference="run:dense")
    steps: list[Progress] = []
    with pytest.raises(rp.RankPruneError, match="run that experiment first"):
        run(e, folders, steps.append)
    assert steps == [], "before anything is trained"
    folders = replace(folders, results=tmp_path / "results")
    dense = run(replace(TINY, name="dense", method="dense"), replace(folders, runs=tmp_path / "elsewhere"))
    path = write(dense | {"test_images": 29}, tmp_path / "results" / "dense.json")
    with pytest.raises(rp.RankPruneError, match="run that experiment first"):  # of other images
        run(e, folders)
    write(dense | {"test_digest": 1}, path)
    with pytest.raises(rp.RankPruneError, match="run that experiment first"):  # encoded in another way
        run(e, folders)
    write(dense | {"method": "trp", "top1_dense": 1.0, "top1_before_decomposition": 2.0}, path)
    assert run(e, folders)["top1_dense"] == 2.0, "of the weights that are not here"
    write(dense, path)
    assert run(e, folders)["top1_dense"] == dense["top1_dense"]


def test_of_several_processes_one_decomposes(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.models.mkdir()
    torch.save(resnet("resnet20", 4).state_dict(), folders.models / "start.th")
    monkeypatch.setattr(runner, "make_plan", lambda *given, **more: pytest.fail("planned by the other one, too"))
    assert run(replace(TINY, method="decompose", start="start.th"), folders, processes=Processes(1, 2)) is None


def test_processes_part_before_one_of_them_evaluates(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    monkeypatch.setattr(Processes, "part_ways", lambda self: events.append("parted"))
    judge = runner.top1
    monkeypatch.setattr(runner, "top1", lambda *given: events.append("judged") or judge(*given))
    run(replace(TINY, trp=TrpConfig(every=2)), folders, lambda progress: events.append("trained"))
    assert events == ["trained"] * 3 + ["parted"] + ["judged"] * 2


def test_the_commit_is_that_at_the_start(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = ["before"]
    monkeypatch.setattr(record, "commit", lambda: commits[-1])
    assert run(replace(TINY, method="dense"), folders, lambda progress: commits.append("after"))["commit"] == "before"


def test_a_plain_decomposition_does_not_go_into_the_folder_of_a_training(folders: Folders) -> None:
    e = replace(TINY, training=replace(TINY.training, epochs=2), trp=TrpConfig(every=2))
    with pytest.raises(KilledError):
        run(e, folders, killed_in_the_second_epoch)
    with pytest.raises(rp.RankPruneError, match="has the checkpoint of a training; take another folder"):
        run(replace(e, method="decompose", start="start.th"), folders)


def test_a_run_killed_while_it_is_judged_is_not_finished(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    e = replace(TINY, method="dense")
    path = write(run(e, replace(folders, runs=folders.runs / "elsewhere")), folders.runs / "tiny.json")

    def killed(*given: object) -> float:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(runner, "top1", killed)
        with pytest.raises(KilledError):
            run(e, folders)
    assert not finished(e, path, folders.runs), "the result that is there is of other weights"
    assert [file.name for file in (folders.runs / "tiny").iterdir()] == ["checkpoint.pt"]
    run(e, folders)
    assert finished(e, path, folders.runs)


def test_a_run_whose_weights_are_of_other_settings_is_not_finished(folders: Folders) -> None:
    e = replace(TINY, method="dense")
    other = replace(e, training=replace(e.training, lr=0.01))
    path = write(run(e, folders), folders.runs / "tiny.json")
    run(other, replace(folders, runs=folders.runs / "elsewhere"))
    weights = "tiny/dense.safetensors"
    (folders.runs / "elsewhere" / weights).replace(folders.runs / weights)
    assert not finished(e, path, folders.runs)


def test_holdout_takes_the_place_of_the_test_split(folders: Folders) -> None:
    result = run(replace(TINY, method="dense", holdout=8), folders)
    assert (result["train_images"], result["test_images"], result["test_split"]) == (40, 8, "holdout")


def test_a_file_of_weights_that_have_seen_the_held_out_images_is_refused(folders: Folders) -> None:
    run(replace(TINY, name="all", method="dense"), folders)
    file = str((folders.runs / "all" / "dense.safetensors").resolve())
    with pytest.raises(rp.RankPruneError, match="held out 0 training images, this run 8"):
        run(replace(TINY, start=file, holdout=8), folders)
    assert run(replace(TINY, name="on", method="dense", start=file), folders)["test_split"] == "test"


@pytest.mark.parametrize("role", ["start", "teacher", "reference"])
def test_what_has_seen_the_held_out_images_is_refused(folders: Folders, role: str) -> None:
    run(replace(TINY, name="all", method="dense"), folders)
    run(replace(TINY, name="part", method="dense", holdout=8), folders)

    def building_on(source: str) -> Experiment:
        training = replace(TINY.training, distill=0.5 * (role == "teacher"))
        return replace(TINY, holdout=8, training=training, trp=TrpConfig(every=2), **{role: source})

    with pytest.raises(rp.RankPruneError, match="'run:all' held out 0 training images, this run 8"):
        run(building_on("run:all"), folders)
    assert run(building_on("run:part"), folders)["test_split"] == "holdout"
    assert run(replace(building_on("run:part"), name="less", holdout=4), folders)["test_images"] == 4


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


def test_resnet18_on_photographs_goes_from_images_to_an_artefact(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 6), ("val", 3)):
        for i, name in enumerate(("dark", "light") * count):
            path = tmp_path / "data" / "two" / split / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.new("RGB", (40 + i, 50), (40 + 160 * (i % 2), 90, 90 + i)).save(path)
    e = Experiment(
        "trp18",
        model="resnet18",
        dataset="two",
        batch=4,
        training=TrainConfig(epochs=2, compile=False, checkpoint_steps=2),
        trp=TrpConfig(rule="Budget(macs=1/2.23)", every=3, ramp=0.5, freeze=0.5),
        photographs=PhotographConfig(sources=["absent", "two"], sizes=[32], test_resize=36, test_size=32, workers=1),
    )
    folders = Folders(tmp_path / "data", tmp_path / "models", tmp_path / "runs")
    with pytest.raises(KilledError):
        run(e, folders, killed_in_the_second_epoch)
    result = run(e, folders)
    assert result.keys() == ALWAYS | DECOMPOSED
    assert {entry["precision"] for entry in result["log"]} <= {"float32", "bfloat16"}
    assert (result["train_images"], result["test_images"], result["dataset"]) == (12, 6, "two")
    assert 0.97 < 2.23 * result["macs"] / result["macs_dense"] <= 1
    assert result["macs_dense"] < 50e6, "counted at 32 x 32"
    assert all(0 < entry["input_share"] < 1 for entry in result["log"])
    assert json.loads(json.dumps(result))["config"]["photographs"]["sizes"] == [32]
    small = rp.load(folders.runs / "trp18" / "artefact", build("resnet18", 2))
    assert rp.count(small, torch.zeros(1, 3, 32, 32)).macs == result["macs"]
