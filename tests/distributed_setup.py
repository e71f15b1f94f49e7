"""What all processes of a torchrun in test_distributed.py train, alone or together."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import rankprune as rp

STEPS, EVERY, BATCH = 7, 3, 8


def network() -> nn.Module:
    """Convolutions, and a Linear large enough for a factorisation to start from the last one."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(24 * 16, 300), nn.ReLU(), nn.Linear(300, 5))
    return nn.Sequential(stem, head)


def batches() -> list[tuple[Tensor, Tensor]]:
    """The same for all processes, each with a multiple of as many images as there are processes."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, 3, 8, 8, generator=generator), torch.randint(5, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def train(model: nn.Module, trp: rp.TRP, rank: int, size: int, before_step: Callable[[int], None] = lambda step: None) -> None:
    """Each of `size` processes takes its part of every batch."""
    optimizer = sgd(model)
    trp.attach(optimizer)
    go_on(model, optimizer, rank, size, range(STEPS), before_step)


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The optimizer that all modes use."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def go_on(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    size: int,
    steps: Iterable[int],
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Take these steps."""
    for step in steps:
        x, y = batches()[step]
        loss = F.cross_entropy(model(x.chunk(size)[rank]), y.chunk(size)[rank])
        optimizer.zero_grad()
        loss.backward()
        before_step(step)
        optimizer.step()


def make(model: nn.Module, group: dist.ProcessGroup | None = None, **changed: Any) -> rp.TRP:
    """The TRP that all modes use."""
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    settings: dict[str, Any] = {"rule": rp.Budget(macs=0.3), "scheme": "auto"}
    settings |= {"every": EVERY, "nuclear": 1e-2, "ramp": 2 * EVERY}
    return rp.TRP(model, **(settings | changed), example_inputs=x, process_group=group)


def together(mode: str) -> tuple[nn.Module, nn.Module]:
    """The network and what is trained of it: itself, sharded as `mode` says, or wrapped by DDP."""
    model = network()
    if mode == "ddp":
        return model, nn.parallel.DistributedDataParallel(model)
    blocks = {"fsdp-root": [], "fsdp-mixed": [model[1]]}.get(mode, list(model))  # type: ignore[index]
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    return model, model


@torch.no_grad()
def evaluate(model: nn.Module) -> None:
    """A forward pass alone, after which FSDP2 leaves the root's weights whole."""
    model(batches()[0][0])


def whole(tensor: Tensor) -> Tensor:
    """A plain copy of a weight, sharded or not."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
