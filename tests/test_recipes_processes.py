"""Joining other processes, and leaving them."""

import pytest
import torch
import torch.distributed as dist

from rankprune.errors import RankPruneError
from rankprune.recipes.processes import joined


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a group of two that is only pretended was taken leave of."""
    left: list[bool] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: monkeypatch.setattr(dist, "is_initialized", lambda: True))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    return left


def test_processes_take_leave_at_the_end(left: list[bool]) -> None:
    with joined() as processes:
        assert (processes.rank, processes.size, processes.first) == (1, 2, False)
    assert left == [True]


def test_a_process_without_a_gpu_of_its_own(left: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RankPruneError, match="2 GPUs here, none for process 2"), joined():
        pass


def test_one_that_fails_does_not_wait_for_peers_in_the_middle_of_a_step(left: list[bool]) -> None:
    with pytest.raises(ZeroDivisionError), joined():
        raise ZeroDivisionError
    assert not left
