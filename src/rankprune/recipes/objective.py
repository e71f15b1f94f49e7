"""What a training minimises: cross-entropy with the labels, and a teacher's answers where there is one."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankprune.recipes.schedule import TrainConfig


def loss_of(logits: Tensor, labels: Tensor, answers: Tensor | None, config: TrainConfig) -> Tensor:
    """Cross-entropy with the labels, mixed by config.distill with the divergence from the teacher's softened answers.

    The divergence is scaled by the square of the temperature, so that its gradient does not fade with it (Hinton et al. 2015).
    Shapes: logits and answers (b, classes), labels (b,) -> ().
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    if answers is None:
        return loss
    t = config.temperature
    divergence = F.kl_div(
        (logits / t).log_softmax(1), (answers.float() / t).log_softmax(1), reduction="batchmean", log_target=True
    )
    return (1 - config.distill) * loss + config.distill * t * t * divergence


class Committee(nn.Module):
    """Networks that answer as one: with the mean of their logits."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Shapes: images (b, ...) -> (b, classes)."""
        return torch.stack([member(images).float() for member in self.members]).mean(0)


def taught(teacher: nn.Module, compile: bool) -> Callable[[Tensor], Tensor]:
    """The answers of a copy of the teacher in eval mode, without gradients."""
    frozen = copy.deepcopy(teacher).eval().requires_grad_(False)
    forward = torch.compile(frozen, dynamic=False) if compile else frozen

    def answers(images: Tensor) -> Tensor:
        with torch.no_grad():
            return forward(images)

    return answers
