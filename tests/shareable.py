"""A decomposed model to share."""

from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

import rankprune as rp
from rankprune.integrations.hub import LowRank


class Net(nn.Module):
    """Convolution, statistics of a BatchNorm, and an embedding tied to the head."""

    def __init__(self, width: int = 24, *, sizes: list[int] | None = None) -> None:
        super().__init__()
        rows, columns = sizes or (10, 16)
        self.table = nn.Embedding(rows, columns)
        self.conv = nn.Conv1d(columns, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout()
        self.inner = nn.Linear(width, columns)
        self.head = nn.Linear(columns, rows, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.drop(self.norm(self.conv(self.table(tokens).mT)).relu())
        return self.head(self.inner(y.mT))


TOKENS = torch.arange(10).view(2, 5)
ARGUMENTS = {"width": 32, "sizes": [10, 20]}


def shared(dtype: torch.dtype = torch.float32, **more: Any) -> LowRank:
    dense = Net(**ARGUMENTS)
    plan = rp.make_plan(dense, TOKENS, rule=rp.FixedRank(3), include=["conv", "inner"], scheme="channel")
    small = rp.decompose(dense, plan)
    small(TOKENS)  # moves the running statistics
    return LowRank(small.to(dtype), plan, **{"builder": Net, "arguments": ARGUMENTS, **more})


def same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        assert torch.equal(value, right[name]), name


class MixinNet(nn.Module, PyTorchModelHubMixin):
    """A user's own class that knows the hub already."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)
