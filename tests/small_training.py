"""A training that takes a moment, and ways to interrupt it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import rankprune as rp
from coloured import coloured
from rankprune.recipes.batches import TrainBatches
from rankprune.recipes.progress import Progress
from rankprune.recipes.schedule import TrainConfig

CONFIG = TrainConfig(epochs=3, lr=0.05, precision="float32", compile=False)


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
    return TrainBatches(coloured(70, seed=options.pop("images", 0)), size, pad=1, **options)


def pruning(model: nn.Module, **options: Any) -> rp.TRP:
    x = torch.zeros(1, 3, 6, 6)
    settings = {"rule": rp.Budget(macs=0.6), "every": 3, "nuclear": 3e-3, "ramp": 6, "freeze": 9, "example_inputs": x}
    return rp.TRP(model, **{**settings, **options})


def exactly_same(a: nn.Module, b: nn.Module) -> None:
    different = [n for (n, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True) if not x.equal(y)]
    assert not different


class KilledError(Exception):
    pass


def kill_in_epoch(number: int) -> Callable[[Progress], None]:
    def on_step(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (number, 2):
            raise KilledError

    return on_step
