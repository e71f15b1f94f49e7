"""A small network, and a training loop whose batches are known by the number of the step."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

import rankprune as rp

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(9))


def network(seed: int = 0, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, width, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(width, 16, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(144, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    )


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    model.train()
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 3, 6, 6, generator=generator), torch.randint(5, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def exactly_same(a: nn.Module, b: nn.Module) -> None:
    different = [n for (n, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True) if not x.equal(y)]
    assert not different


def relative_macs(plan: rp.Plan) -> float:
    return plan.macs / plan.macs_dense
