"""The processes that run a recipe together: those that torchrun or accelerate launch started, or just this one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from rankprune.errors import RankPruneError

PATIENCE = timedelta(hours=3)
"""More than it takes one process to time a network while the others wait, for a budget of latency."""


@dataclass(frozen=True)
class Processes:
    """This process among its peers, and the device it computes on."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether it is the one that writes files and talks."""
        return self.rank == 0

    def part_of(self, batch: int) -> slice:
        """The part of every batch that this process takes.

        Raises:
            RankPruneError: if the batch cannot be divided evenly.
        """
        if batch % self.size:
            raise RankPruneError(f"a batch of {batch} images cannot be divided among {self.size} processes; use a multiple")
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def part_ways(self) -> None:
        """Called by all at the same time: from here on none waits for another."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def first_here() -> bool:
    """Whether this process is the first of them, also before they have joined."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that the launcher's environment variables name, for the length of the block.

    Each takes the GPU of its local rank, where there are GPUs, otherwise the CPU. They wait for each other for up to PATIENCE.
    One that fails goes at once, without taking leave: its peers may be in the middle of a step, and it would wait for them.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = f"cuda:{local}" if cuda else "cpu"
    if cuda:
        if local >= (there := torch.cuda.device_count()):
            raise RankPruneError(f"there are {there} GPUs here, none for process {local}: start as many processes as GPUs")
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device=device)
        return
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    yield Processes(dist.get_rank(), dist.get_world_size(), device)
    if dist.is_initialized():
        dist.destroy_process_group()
