import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rankprune.distributed import Team

WORKER = Path(__file__).with_name("distributed_worker.py")
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo"
)


def torchrun(mode: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER), mode]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)


@needs_gloo
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_equal_one(mode: str) -> None:
    run = torchrun(mode)
    assert run.returncode == 0, run.stderr[-4000:]


@needs_gloo
def test_an_error_of_one_process_reaches_all() -> None:
    run = torchrun("fail")
    assert run.returncode == 0, run.stderr[-4000:]
    assert sorted(run.stdout.split("\n")[:2]) == ["process 0 was told", "process 1 was told"]


@needs_gloo
def test_a_process_that_dies_ends_the_run() -> None:
    begin = time.monotonic()
    run = torchrun("die")
    assert run.returncode != 0
    assert time.monotonic() - begin < 120
    assert "Signal 9" in run.stderr, run.stderr[-4000:]


def test_work_is_shared_out_by_cost() -> None:
    team = Team.alone()
    assert team.owners({"a": 3.0, "b": 1.0}) == {"a": 0, "b": 0}
    team.size = 3
    costs = {"a": 8.0, "b": 7.0, "c": 6.0, "d": 5.0, "e": 4.0}
    owners = team.owners(costs)
    loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(3)]
    assert sorted(loads) == [8.0, 11.0, 11.0]
    assert owners == team.owners(dict(reversed(costs.items()))), "all processes must come to the same"


def test_alone_nothing_is_communicated() -> None:
    team = Team()
    weight, new = torch.nn.Parameter(torch.zeros(2)), torch.ones(2)
    assert (team.size, team.rank) == (1, 0)
    assert team.whole(weight) is weight
    assert team.share(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(ZeroDivisionError):
        team.share(lambda: {"a": 1 // 0})
    team.publish({"a": weight}, {"a": new}, {"a": 0})
    assert torch.equal(weight, new)
