import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from coloured import coloured, write_parquet
from rankprune import distributed
from rankprune.distributed import Team, sharded_like
from rankprune.errors import RankPruneError
from rankprune.recipes.batches import TrainBatches
from rankprune.recipes.processes import Processes, joined

WORKER = Path(__file__).with_name("distributed_worker.py")
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo"
)


def torchrun(*script: object, processes: int = 2, **options: Any) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, *map(str, script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, **options)


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


def several(*modes: str) -> object:
    """To be run in the same processes one after the other, for starting them takes longer than most."""
    return pytest.param(modes, id=", ".join(modes))


@needs_gloo
@pytest.mark.parametrize(
    "modes",
    [
        several("ddp", "fsdp-root", "fsdp-mixed", "recipe", "plan-once", "warm-up", "tensor-parallel", "reading", "parted"),
        slow(["fsdp", "without-scatter"]),
    ],
)
def test_two_processes_equal_one(modes: tuple[str, ...]) -> None:
    run = torchrun(WORKER, *modes)
    assert run.returncode == 0, run.stderr[-4000:]


@needs_gloo
def test_weights_sharded_over_a_single_process() -> None:
    run = torchrun(WORKER, "fsdp", processes=1)
    assert run.returncode == 0, run.stderr[-4000:]


@needs_gloo
@pytest.mark.parametrize("modes", [several("resume-ddp", "resume-fsdp", "recipe-killed"), slow(["resume-elsewhere"])])
def test_a_resumed_training_takes_the_same_steps(modes: tuple[str, ...]) -> None:
    run = torchrun(WORKER, *modes)
    assert run.returncode == 0, run.stderr[-4000:]


@needs_gloo
@pytest.mark.slow
def test_a_single_process_resumes_sharded_weights() -> None:
    run = torchrun(WORKER, "resume-fsdp", processes=1)
    assert run.returncode == 0, run.stderr[-4000:]


@needs_gloo
def test_an_error_of_one_process_reaches_all() -> None:
    run = torchrun(WORKER, "fail", "fail-late", "disagree")
    assert run.returncode == 0, run.stderr[-4000:]
    assert (run.stdout.count("was told of"), run.stdout.count("was told")) == (8, 10)  # lines of two processes may run together


@needs_gloo
def test_latencies_are_measured_by_one_process_and_kept_for_sharded_weights(tmp_path: Path) -> None:
    run = torchrun(WORKER, "latency", "latency-sharded", env={**os.environ, "RANKPRUNE_CACHE": str(tmp_path)})
    assert run.returncode == 0, run.stderr[-4000:]
    assert "process 1 measured 0 times" in run.stdout


@needs_gloo
def test_a_process_that_dies_ends_the_run() -> None:
    begin = time.monotonic()
    run = torchrun(WORKER, "die")
    assert run.returncode != 0
    assert time.monotonic() - begin < 240
    assert "Signal 9" in run.stderr, run.stderr[-4000:]


PHOTOGRAPHS = ["[photographs]", "sizes = [8]", "test_resize = 10", "test_size = 8", "workers = 1"]


@needs_gloo
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "photographs", [pytest.param([], id="images"), pytest.param(PHOTOGRAPHS, id="photographs", marks=pytest.mark.slow)]
)
def test_the_recipes_run_under_torchrun(photographs: list[str], tmp_path: Path) -> None:
    for split, images in (("train", coloured(48, 8)), ("test", coloured(30, 8, seed=5))):
        write_parquet(tmp_path / "tiny" / f"{split}-0.parquet", images)
    rows = [
        "method = 'trp'",
        "dataset = 'tiny'",
        "batch = 16",
        "[training]",
        "epochs = 1",
        "lr = 1e-4",  # so that how much BatchNorm sees is all that tells them apart
        "compile = false",
        "[trp]",
        "every = 2",
        *photographs,
    ]
    (tmp_path / "row.toml").write_text("\n".join(rows))
    results: dict[str, dict] = {}
    environment = {**os.environ, "RANKPRUNE_DATA": str(tmp_path)}
    for name in ("together", "alone"):
        folder = tmp_path / name
        command = ["-m", "rankprune", "bench", "run", tmp_path / "row.toml", "--results", folder, "--runs", folder]
        if name == "together":
            run = torchrun(*command, env=environment)
        else:
            run = subprocess.run(
                [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=150, env=environment
            )
        assert run.returncode == 0, run.stderr[-4000:]
        assert run.stdout.count("result") == 1, "one process talks"
        results[name] = json.loads((folder / "row.json").read_text())
    together, alone = results["together"], results["alone"]
    assert together["log"][0]["loss"] == pytest.approx(alone["log"][0]["loss"], rel=0.1), "BatchNorm sees parts of batches"
    assert together["macs"] <= together["macs_dense"] / 2.2
    assert together["train_images"] == alone["train_images"] == 48


@needs_gloo
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rows_that_build_on_each_other_run_under_torchrun_compiled(tmp_path: Path) -> None:
    for split, images in (("train", coloured(48, 8)), ("test", coloured(30, 8, seed=5))):
        write_parquet(tmp_path / "tiny" / f"{split}-0.parquet", images)
    common = ["dataset = 'tiny'", "batch = 16"]
    rows = {
        "dense": ["method = 'dense'", *common, "[training]", "epochs = 1"],
        "tuned": ["method = 'decompose+finetune'", "start = 'run:dense'", *common, "[training]", "epochs = 1"],
        "ours": [
            "method = 'ours'",
            "start = 'run:dense'",
            *common,
            "[training]",
            "epochs = 1",
            "distill = 0.7",
            "checkpoint_steps = 2",
        ],
    }
    environment = {**os.environ, "RANKPRUNE_DATA": str(tmp_path)}
    for name, lines in rows.items():
        (tmp_path / f"{name}.toml").write_text("\n".join([*lines, "[trp]", "every = 2", "ramp = 0.5"]))
        command = [
            "-m",
            "rankprune",
            "bench",
            "run",
            tmp_path / f"{name}.toml",
            "--results",
            tmp_path,
            "--runs",
            tmp_path / "runs",
        ]
        run = torchrun(*command, env=environment)
        assert run.returncode == 0, f"{name}: {run.stderr[-4000:]}"
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in rows}
    assert results["tuned"]["top1_before_decomposition"] == results["dense"]["top1"]
    for name in ("tuned", "ours"):
        assert results[name]["macs"] <= results[name]["macs_dense"] / 2.2
        assert len(results[name]["log"]) == 1


def test_processes_of_a_recipe_wait_long_for_one_that_times_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    joining: dict[str, Any] = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: joining.update(options))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with joined() as processes:
        assert processes.size == 2
    assert joining["timeout"] >= timedelta(hours=1)


def test_a_batch_is_divided_evenly_or_not_at_all() -> None:
    parts = [TrainBatches(coloured(20), 8, pad=1, part=Processes(rank, 2).part_of(8)) for rank in range(2)]
    whole = TrainBatches(coloured(20), 8, pad=1)
    for first, second, (images, labels) in zip(*(part.epoch(3) for part in parts), whole.epoch(3), strict=True):
        assert torch.equal(torch.cat([first[0], second[0]]), images)
        assert torch.equal(torch.cat([first[1], second[1]]), labels)
    with pytest.raises(RankPruneError, match="cannot be divided among 3"):
        Processes(0, 3).part_of(8)


def test_work_is_shared_out_by_cost() -> None:
    team = Team.alone()
    assert team.owners({"a": 3.0, "b": 1.0}) == {"a": 0, "b": 0}
    team.size = 3
    costs = {"a": 8.0, "b": 7.0, "c": 6.0, "d": 5.0, "e": 4.0}
    owners = team.owners(costs)
    loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(3)]
    assert sorted(loads) == [8.0, 11.0, 11.0]
    assert owners == team.owners(dict(reversed(costs.items()))), "all processes must come to the same"


def test_weights_on_the_cpu_go_through_the_device_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(distributed.dist, "get_backend", lambda group: "nccl")
    device, moved = torch.device("cuda", 3), []
    monkeypatch.setattr(distributed, "_of_nccl", lambda: device)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where: (moved.append(where), tensor.clone())[1])
    monkeypatch.setattr(distributed.dist, "broadcast", lambda tensor, **_: sent.append(tensor.fill_(7.0)))
    target = torch.zeros(3)
    Team.alone()._broadcast(target, 1)
    assert sent[0] is not target
    assert moved == [(device,)]
    assert target.tolist() == [7.0] * 3


def test_alone_nothing_is_communicated() -> None:
    team = Team()
    weight, new = torch.nn.Parameter(torch.zeros(2)), torch.ones(2)
    assert (team.size, team.rank) == (1, 0)
    assert team.whole(weight) is weight
    assert team.share(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(ZeroDivisionError):
        team.share(lambda: {"a": 1 // 0})
    assert team.together(lambda: "result") == "result"
    with pytest.raises(ZeroDivisionError):
        team.together(lambda: 1 // 0)
    assert sharded_like(new, weight) is new
    team.publish({"a": weight}, {"a": new}, {"a": 0})
    assert torch.equal(weight, new)
