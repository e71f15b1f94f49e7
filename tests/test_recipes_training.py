"""The training loop: it learns, by the steps that are written here by hand."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn import functional as F

import rankprune as rp
from coloured import coloured
from rankprune.recipes.batches import TrainBatches, eval_batches
from rankprune.recipes.evaluation import top1
from rankprune.recipes.progress import Progress
from rankprune.recipes.schedule import TrainConfig, learning_rate
from rankprune.recipes.training import _Awaited, train
from small_training import CONFIG, KilledError, batches, exactly_same, kill_in_epoch, network, pruning


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns(pruned: bool, precision: str) -> None:
    model, test = network(), coloured(40, seed=5)
    before = top1(model, eval_batches(test))
    trp = pruning(model) if pruned else None
    log = train(model, batches(), replace(CONFIG, epochs=8, lr=0.1, precision=precision), trp=trp)
    assert [entry.epoch for entry in log] == list(range(8))
    assert log[-1].loss < 0.3 * log[0].loss
    assert before < 60 < 90 < top1(model, eval_batches(test))
    assert log[-1].ranks == (trp.plan.ranks if trp else {})
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_equals_a_loop_written_by_hand() -> None:
    model, theirs = network(), network()
    config = replace(CONFIG, warmup_steps=2)
    log = train(model, batches(), config)
    velocity = [torch.zeros_like(p) for p in theirs.parameters()]
    losses = []
    for step, (images, labels) in enumerate(b for epoch in range(3) for b in batches().epoch(epoch)):
        lr = 0.05 * (step + 1) / 2 if step < 2 else 0.05 * (1 + math.cos(math.pi * (step - 2) / 10)) / 2
        loss = F.cross_entropy(theirs(images), labels)
        gradients = torch.autograd.grad(loss, list(theirs.parameters()))
        with torch.no_grad():
            for p, g, v in zip(theirs.parameters(), gradients, velocity, strict=True):
                g = g + 1e-4 * p
                v.mul_(0.9).add_(g)
                p.sub_(lr * (g + 0.9 * v))
        losses.append(loss.item())
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert [entry.loss for entry in log] == pytest.approx([sum(losses[i : i + 4]) / 4 for i in (0, 4, 8)], rel=1e-4)


def test_input_share_is_the_part_of_the_time_that_batches_are_waited_for() -> None:
    class Slow(TrainBatches):
        def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in super().epoch(number, start):
                time.sleep(0.1)
                yield batch

    slow = train(network(), Slow(coloured(70), 16, pad=1), CONFIG)
    assert all(0.4 / e.seconds - 0.05 < e.input_share < 1 for e in slow)


def test_waiting_for_batches_is_told_from_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal now
        for _ in range(3):
            now += 2
            yield torch.zeros(1), torch.zeros(1)

    awaited = _Awaited(stream(), 1.0)
    for _ in awaited:
        now += 5
    assert awaited.seconds == 1 + 3 * 2


def test_trp_is_detached_also_when_training_is_interrupted() -> None:
    model = network()
    trp = pruning(model)
    with pytest.raises(KilledError):
        train(model, batches(), CONFIG, trp=trp, on_step=kill_in_epoch(0))
    trp.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_without_a_compiler_it_is_told_how_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(model: nn.Module, **_: Any) -> Callable[..., Any]:
        def forward(*_: Any) -> Any:
            raise TorchDynamoException("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found")

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(
        rp.RankPruneError, match=r"does not work here \(.*C\+\+ compiler.*\); train without it, by --no-compile"
    ):
        train(network(), batches(), replace(CONFIG, compile=True))


def test_on_step_sees_every_step() -> None:
    seen: list[Progress] = []
    train(network(), batches(), CONFIG, on_step=seen.append)
    assert [(p.epoch, p.step, p.steps_per_epoch) for p in seen] == [(e, s, 4) for e in range(3) for s in range(1, 5)]
    assert [p.lr for p in seen] == [learning_rate(CONFIG, i, 12) for i in range(12)]
    assert all(p.loss.shape == () and not p.loss.requires_grad for p in seen)


def test_learning_rate() -> None:
    config = TrainConfig(lr=0.4, warmup_steps=4)
    assert [learning_rate(config, s, 104) for s in (0, 1, 3)] == pytest.approx([0.1, 0.2, 0.4])
    assert [learning_rate(config, s, 104) for s in (4, 54, 104)] == pytest.approx([0.4, 0.2, 0.0])
    falling = [learning_rate(config, s, 104) for s in range(4, 105)]
    assert falling == sorted(falling, reverse=True)
    assert learning_rate(TrainConfig(lr=0.4), 0, 0) == 0.4


def test_learning_rate_in_steps() -> None:
    config = TrainConfig(epochs=164, lr=0.1, milestones=(81, 122))
    total = 164 * 390
    rates = [learning_rate(config, step, total) for step in (0, 81 * 390 - 1, 81 * 390, 122 * 390 - 1, 122 * 390, total - 1)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    with pytest.raises(rp.RankPruneError, match=r"milestones=\(81, 122\): give epochs within the 100"):
        replace(config, epochs=100)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: TrainConfig(epochs=-1), "epochs=-1"),
        (lambda: TrainConfig(lr=0.0), r"lr=0\.0"),
        (lambda: TrainConfig(weight_decay=-1e-4), r"weight_decay=-0\.0001"),
        (lambda: TrainConfig(momentum=1.0), r"momentum=1\.0"),
        (lambda: train(network(), batches(128), CONFIG), "70 images do not fill one batch of 128"),
        (lambda: train(network(), batches(), replace(CONFIG, lr=1e30)), "lower the learning rate"),
        (lambda: TrainConfig(checkpoint_steps=-1), "checkpoint_steps=-1"),
        (lambda: TrainConfig(label_smoothing=1.0), r"label_smoothing=1\.0"),
    ],
)
def test_bad_values_are_named(build: Callable, said: str) -> None:
    with pytest.raises(rp.RankPruneError, match=said):
        build()


def test_top1_leaves_the_model_alone() -> None:
    model = network().train()
    before = copy.deepcopy(model)
    images = torch.randn(4, 3, 6, 6)
    labels = model.eval()(images).argmax(1)
    model.train()
    assert top1(model, [(images, labels), (images, (labels + 1) % 4)]) == 50
    assert model.training
    exactly_same(model, before)


def test_steps_with_a_teacher_equal_some_written_by_hand() -> None:
    model, theirs, teacher = network(), network(), network(seed=1, dropout=0.5).train()
    config = replace(CONFIG, epochs=1, distill=0.7, temperature=3.0, momentum=0.0, weight_decay=0.0)
    train(model, batches(), config, teacher=teacher)
    teacher.eval()
    for step, (images, labels) in enumerate(batches().epoch(0)):
        logits = theirs(images)
        wanted = (teacher(images).detach() / 3).softmax(1)
        divergence = (wanted * (wanted.log() - (logits / 3).log_softmax(1))).sum(1).mean()
        loss = 0.3 * F.cross_entropy(logits, labels) + 0.7 * 9 * divergence
        gradients = torch.autograd.grad(loss, list(theirs.parameters()))
        with torch.no_grad():
            for p, g in zip(theirs.parameters(), gradients, strict=True):
                p.sub_(learning_rate(config, step, 4) * g)
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_teacher_is_left_alone_and_taught_from_as_it_was_at_the_start() -> None:
    model, plain = network(), network()
    before = copy.deepcopy(model)
    config = replace(CONFIG, distill=1.0, epochs=1)
    train(model, batches(), config, teacher=model)
    train(plain, batches(), config, teacher=before)
    exactly_same(model, plain)
    assert before.training
    assert all(p.requires_grad for p in before.parameters())


@pytest.mark.parametrize("wrong", [{"distill": 1.5}, {"distill": -0.1}, {"temperature": 0.0}])
def test_distillation_out_of_range(wrong: dict) -> None:
    with pytest.raises(rp.RankPruneError, match=str(next(iter(wrong.values())))):
        replace(CONFIG, **wrong)
    with pytest.raises(rp.RankPruneError, match="needs a teacher"):
        train(network(), batches(), replace(CONFIG, distill=0.5))


class Pooled(nn.Module):
    """Takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


class Growing(TrainBatches):
    """Images of another size at each step."""

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for i, (images, labels) in enumerate(super().epoch(number, start), start):
            yield F.pad(images, (0, i, 0, i)), labels


def test_images_of_many_sizes_are_trained_on_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable:
        compiled.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(model, backend=backend, **options))
    data = Growing(coloured(24), 2, pad=1)
    train(Pooled(), data, replace(CONFIG, epochs=1, compile=True, distill=0.5), teacher=Pooled())
    assert len(compiled) == 2 * len(data) > 2 * 8
