"""Accuracy of a classifier."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rankprune.cost import undisturbed


@torch.no_grad()
def top1(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The percentage of images whose highest logit is their label's, in eval mode. The model is left as it was.

    Batches: images (b, ...) and labels (b,).
    """
    right = seen = 0
    with undisturbed(model):
        for images, labels in batches:
            right += int((model(images).argmax(1) == labels).sum())
            seen += len(labels)
    return 100 * right / max(seen, 1)
