"""What counts as the answer of a classifier."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from rankprune.recipes.evaluation import top1

IMAGES, LABELS = torch.eye(4, 3), torch.tensor([0, 1, 2, 1])


class Answering(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        return self.answer(images)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: SimpleNamespace(logits=x)])
def test_logits_are_taken_as_they_come(wrap: Callable[[Tensor], Any]) -> None:
    assert top1(Answering(wrap), [(IMAGES[:3], LABELS[:3]), (IMAGES[3:], LABELS[3:])]) == 75.0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x: (x, x), "answers with a tuple, no logits"),
        (lambda x: x[:, :, None], r"answers with a Tensor of shape \(4, 3, 1\), no logits"),
        (lambda x: x[0:1], r"answers with a Tensor of shape \(1, 3\), no logits"),
        (lambda x: x @ x, r"does not run on images of shape \(4, 3\): "),
        (lambda x: torch._assert(x.shape[1] == 224, "wrong width"), r"shape \(4, 3\): wrong width"),
    ],
)
def test_other_answers_are_refused(answer: Callable[[Tensor], Any], said: str) -> None:
    with pytest.raises(rp.RankPruneError, match=said):
        top1(Answering(answer), [(IMAGES, LABELS)])
