"""Accuracy of a classifier."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rankprune.errors import RankPruneError
from rankprune.passes import undisturbed


@torch.no_grad()
def top1(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The percentage of images whose highest logit is their label's, in eval mode. The model is left as it was.

    Batches: images (b, ...) and labels (b,).

    Raises:
        RankPruneError: if the model does not run on them, or gives no logits.
    """
    right = seen = 0
    with undisturbed(model):
        for images, labels in batches:
            right += int((logits_of(model, images).argmax(1) == labels).sum())
            seen += len(labels)
    return 100 * right / max(seen, 1)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """What a classifier answers: (b, classes), also of models that wrap it as `logits`, as those of transformers do.

    Raises:
        RankPruneError: as top1.
    """
    try:
        answer = model(images)
    except Exception as error:  # of the model's own code
        shape, why = tuple(images.shape), str(error) or type(error).__name__
        raise RankPruneError(f"the model does not run on images of shape {shape}: {why}") from error
    answer = getattr(answer, "logits", answer)
    if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(images):
        shape = f" of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else ""
        raise RankPruneError(f"the model answers with a {type(answer).__name__}{shape}, no logits of shape (images, classes)")
    return answer
