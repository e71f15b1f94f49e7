import torch
from torch import nn
from torch.nn import functional as F

from rankprune.recipes.objective import Committee, loss_of
from rankprune.recipes.schedule import TrainConfig


def test_distillation_mixes_labels_with_the_teachers_softened_answers() -> None:
    logits, answers, labels = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 4
    config = TrainConfig(distill=0.7, temperature=4.0)
    p, q = (answers / 4).softmax(1), (logits / 4).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = 0.3 * F.cross_entropy(logits, labels) + 0.7 * 16 * divergence
    torch.testing.assert_close(loss_of(logits, labels, answers, config), expected)
    torch.testing.assert_close(loss_of(logits, labels, None, config), F.cross_entropy(logits, labels))
    smoothed = 0.8 * F.cross_entropy(logits, labels) - 0.2 * logits.log_softmax(1).mean()
    torch.testing.assert_close(loss_of(logits, labels, None, TrainConfig(label_smoothing=0.2)), smoothed)


def test_a_committee_answers_with_the_mean_of_its_members() -> None:
    one, other, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(5, 3)
    torch.testing.assert_close(Committee([one, other])(x), (one(x) + other(x)) / 2)
