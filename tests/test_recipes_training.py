"""The training loop: it learns, and resumes to the bit."""

import copy
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
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


class KilledError(Exception):
    pass


def kill_in_epoch(number: int) -> Callable[[Progress], None]:
    def on_step(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (number, 2):
            raise KilledError

    return on_step


@pytest.mark.parametrize("checkpoint_steps", [0, 1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("pruned", [False, True])
def test_killed_and_called_again_is_uninterrupted(tmp_path: Path, pruned: bool, dropout: float, checkpoint_steps: int) -> None:
    config = replace(CONFIG, checkpoint_steps=checkpoint_steps)

    def call(seed: int, checkpoint: Path | None, on_step: Callable | None = None) -> tuple:
        model = network(seed, dropout)
        trp = pruning(model) if pruned else None
        return model, train(model, batches(seed=4), config, trp=trp, checkpoint=checkpoint, on_step=on_step), trp

    whole, log, trp = call(0, None)
    expected = copy.deepcopy(whole)  # finalize projects, and changes weights by rounding
    path = tmp_path / "runs" / "checkpoint.pt"
    with pytest.raises(KilledError):
        call(0, path, kill_in_epoch(1))
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]
    torch.rand(3)
    steps: list[Progress] = []
    resumed, log2, trp2 = call(1, path, steps.append)
    assert (steps[0].epoch, steps[0].step) == (1, 2 if checkpoint_steps == 1 else 1)
    exactly_same(resumed, whole)
    assert [(e.epoch, e.loss, e.ranks) for e in log2] == [(e.epoch, e.loss, e.ranks) for e in log]
    if trp:
        assert (trp2.steps, trp2.plan, trp2.history) == (12, trp.plan, trp.history)
        exactly_same(trp2.finalize(), trp.finalize())
    steps.clear()
    again, log3, _ = call(2, path, steps.append)  # finished: nothing is left to do
    exactly_same(again, expected)
    assert (log3, steps) == (log2, [])


KILLED = """
import os, signal, sys, torch
from dataclasses import replace
from pathlib import Path
from test_recipes_training import CONFIG, batches, network, pruning, train

def kill(progress):
    if (progress.epoch, progress.step) == (1, 4):
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(int(sys.argv[2]))
model = network(0, 0.3)
train(model, batches(), replace(CONFIG, checkpoint_steps=3), trp=pruning(model), checkpoint=Path(sys.argv[1]), on_step=kill)
"""


def test_a_killed_process_is_gone_on_from_in_the_middle_of_its_epoch(tmp_path: Path) -> None:
    path, threads = tmp_path / "checkpoint.pt", torch.get_num_threads()
    command = [sys.executable, "-c", KILLED, str(path), str(threads)]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=250)
    assert run.returncode == -signal.SIGKILL, run.stderr
    resumed, whole = network(1, 0.3), network(0, 0.3)
    steps: list[Progress] = []
    config = replace(CONFIG, checkpoint_steps=2)  # how often they are written may change
    log = train(resumed, batches(), config, trp=pruning(resumed), checkpoint=path, on_step=steps.append)
    assert (steps[0].epoch, steps[0].step, len(steps)) == (1, 4, 5)
    torch.manual_seed(0)
    whole = network(0, 0.3)
    assert [e.loss for e in train(whole, batches(), CONFIG, trp=pruning(whole))] == [e.loss for e in log]
    exactly_same(resumed, whole)


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


def test_a_checkpoint_without_the_later_options_is_gone_on_from(checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    settings = json.loads(state["settings"])
    del settings["training"]["label_smoothing"]
    for entry in state["log"]:
        del entry["input_share"]
    former = {k: v for k, v in state.items() if k not in ("step", "loss_sum", "seconds", "waited")}
    torch.save({**former, "settings": json.dumps(settings)}, checkpoint)
    model = network(1)
    log = train(model, batches(), replace(CONFIG, epochs=1), trp=pruning(model), checkpoint=checkpoint)
    assert [e.epoch for e in log] == [0]
    whole = network()
    train(whole, batches(), replace(CONFIG, epochs=1), trp=pruning(whole))
    exactly_same(model, whole)
    with pytest.raises(rp.CheckpointError, match="another config"):
        train(model, batches(), replace(CONFIG, epochs=1, label_smoothing=0.1), trp=pruning(model), checkpoint=checkpoint)


def test_trp_is_detached_also_when_training_is_interrupted() -> None:
    model = network()
    trp = pruning(model)
    with pytest.raises(KilledError):
        train(model, batches(), CONFIG, trp=trp, on_step=kill_in_epoch(0))
    trp.attach(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = network()
    train(model, batches(), replace(CONFIG, epochs=1), trp=pruning(model), checkpoint=tmp_path / "c.pt")
    return tmp_path / "c.pt"


OTHER = {
    "learning rate": {"config": replace(CONFIG, epochs=1, lr=0.1)},
    "epochs": {"config": replace(CONFIG, epochs=2)},
    "no pruning": {"trp": None},
    "other rule": {"trp": {"rule": rp.Energy(0.9)}},
    "other period": {"trp": {"every": 4}},
    "other nuclear weight": {"trp": {"nuclear": 0.0}},
    "other cadence": {"trp": {"nuclear_cadence": "projection"}},
    "ranks that stay": {"trp": {"freeze": 100}},
    "other multiples": {"trp": {"round_to": 2}},
    "other batch": {"batches": {"size": 32}},
    "other order": {"batches": {"seed": 1}},
    "as many other images": {"batches": {"images": 1}},
    "other start": {"identity": {"start": "another.pt"}},
}


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER)
def test_checkpoint_of_another_config_is_refused(checkpoint: Path, other: dict) -> None:
    model = network()
    settings = {"config": replace(CONFIG, epochs=1), "trp": {}, "batches": {}, **other}
    trp = None if settings["trp"] is None else pruning(model, **settings["trp"])
    data = batches(**settings["batches"])
    with pytest.raises(rp.CheckpointError, match=r"c\.pt.*another config: \w+.* there, .* here\. Delete it"):
        train(model, data, settings["config"], trp=trp, checkpoint=checkpoint, identity=settings.get("identity"))
    exactly_same(model, network())


def test_what_differs_from_a_checkpoint_is_named_alone(checkpoint: Path) -> None:
    model = network()
    with pytest.raises(rp.CheckpointError, match=r"another config: training\.lr is 0\.05 there, 0\.1 here\. Delete"):
        train(model, batches(), replace(CONFIG, epochs=1, lr=0.1), trp=pruning(model), checkpoint=checkpoint)


def test_going_on_in_another_precision_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(epochs: int, native: bool) -> None:
        monkeypatch.setattr("rankprune.recipes.training.has_native_bfloat16", lambda device: native)
        stop = kill_in_epoch(1) if epochs == 1 else None
        train(network(), batches(), replace(CONFIG, precision="auto"), checkpoint=tmp_path / "c.pt", on_step=stop)

    with pytest.raises(KilledError):
        run(1, native=False)
    with pytest.warns(UserWarning, match="began in float32 and goes on in bfloat16"):
        run(3, native=True)


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


@pytest.mark.parametrize("content", [b"", b"no checkpoint", {"conv.weight": torch.zeros(2)}, [1, 2]], ids=str)
def test_damaged_or_foreign_checkpoint(tmp_path: Path, content: object) -> None:
    if isinstance(content, bytes):
        (tmp_path / "c.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "c.pt")
    with pytest.raises(rp.CheckpointError, match=r"c\.pt"):
        train(network(), batches(), CONFIG, checkpoint=tmp_path / "c.pt")


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
