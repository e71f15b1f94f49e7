"""How to train: the choices, and the learning rate that follows from them."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from rankprune.errors import RankPruneError

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train: by SGD with Nesterov momentum.

    `precision` is that of autocast; "auto" takes bfloat16 where the processor multiplies it natively. `distill` is the weight
    of the teacher's softened answers, at `temperature`, against that of the labels (Hinton et al. 2015); 0 needs no teacher.
    `label_smoothing` is the share of a label that goes to all classes alike. `checkpoint_steps` is how often to write a
    checkpoint within an epoch; 0 writes one after each epoch only. The learning rate falls by a cosine, or to a tenth at the
    start of each epoch in `milestones`.
    """

    epochs: int = 30
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    label_smoothing: float = 0.0
    distill: float = 0.0
    temperature: float = 4.0
    precision: Precision = "auto"
    compile: bool = True
    seed: int = 0
    checkpoint_steps: int = 0
    milestones: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(not 0 < epoch < self.epochs for epoch in self.milestones):
            raise RankPruneError(f"milestones={self.milestones}: give epochs within the {self.epochs}, like [81, 122]")
        if self.epochs < 0 or self.checkpoint_steps < 0:
            raise RankPruneError(f"epochs={self.epochs}, checkpoint_steps={self.checkpoint_steps}: give 0 or more")
        if not self.lr > 0:
            raise RankPruneError(f"lr={self.lr}: give a positive learning rate")
        if not 0 <= self.momentum < 1 or not self.weight_decay >= 0 or self.warmup_steps < 0:
            raise RankPruneError(
                f"momentum={self.momentum}, weight_decay={self.weight_decay}, warmup_steps={self.warmup_steps}: give a "
                "momentum from 0 to below 1, the others 0 or more"
            )
        if self.precision not in get_args(Precision):
            raise RankPruneError(f"precision={self.precision!r}: choose one of {', '.join(get_args(Precision))}")
        if not 0 <= self.label_smoothing < 1:
            raise RankPruneError(f"label_smoothing={self.label_smoothing}: give a share from 0 to below 1")
        if not 0 <= self.distill <= 1 or not self.temperature > 0:
            raise RankPruneError(
                f"distill={self.distill}, temperature={self.temperature}: give a weight from 0 to 1, and a positive temperature"
            )


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """That of a step of `total`: linear warm-up, then a cosine from config.lr to 0, or steps down at the milestones."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.milestones:
        return config.lr * 0.1 ** sum(step * config.epochs >= epoch * total for epoch in config.milestones)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / max(1, total - config.warmup_steps)))
