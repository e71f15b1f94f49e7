"""The training loop of the recipes: SGD with a cosine schedule, any attached TRP, checkpoints, exact resume."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankprune.backends.base import reason_of
from rankprune.backends.pytorch import programs_of_one_code
from rankprune.errors import RankPruneError
from rankprune.recipes.batches import Batches
from rankprune.recipes.objective import loss_of, taught
from rankprune.recipes.progress import EpochLog, Journal, Progress
from rankprune.recipes.schedule import Precision, TrainConfig, learning_rate
from rankprune.recipes.snapshot import read_snapshot, write_snapshot
from rankprune.trp import TRP

PROGRAMS = 64
"""So many sizes of images are trained on compiled, of the network and its teacher together."""


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones here; emulated ones are slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        known = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return False


def precision_on(device: torch.device, config: TrainConfig) -> Precision:
    """The precision of a training there: config.precision, or what "auto" comes to."""
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if has_native_bfloat16(device) else "float32"


def train(
    model: nn.Module,
    batches: Batches,
    config: TrainConfig,
    *,
    trp: TRP | None = None,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    on_step: Callable[[Progress], None] | None = None,
    identity: Mapping[str, Any] | None = None,
    by: str | None = None,
) -> list[EpochLog]:
    """Train `model` in place and return a log of its epochs.

    With torch.distributed initialised, all processes call it, each with its part of the batches; gradients are averaged over
    them (DistributedDataParallel), and the first one writes the checkpoint, in a folder that all of them see.

    Args:
        trp: attached to the optimizer for the length of the training, then detached; finalize() is left to the caller.
        teacher: the network whose answers config.distill weighs; run in eval mode, otherwise left as it is.
        checkpoint: written after every epoch, and after every config.checkpoint_steps steps of one. If it is there at the
            start and of the same config and identity, the run goes on from it and ends as it would have ended uninterrupted,
            in one process bit for bit.
        identity: plain values that say what is trained on what, as far as it is not in the config.
        by: what computes this, for the log: the commit and the machine, say.

    Raises:
        CheckpointError: if the checkpoint is of a run with another config or identity.
        RankPruneError: if there are fewer images than one batch, a teacher is missing, or torch.compile has no compiler.

    Warns:
        UserWarning: if the run goes on in another precision than it began in, on another machine, by precision="auto".
    """
    if not len(batches):
        raise RankPruneError(f"{len(batches.labels)} images do not fill one batch of {batches.batch}; use a smaller batch")
    if config.distill and teacher is None:
        raise RankPruneError(f"distill={config.distill} needs a teacher to learn from")
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    answers_of = taught(teacher, config.compile) if teacher is not None and config.distill else None  # before the model changes
    precision = precision_on(device, config)
    settings = {"identity": dict(identity or {}), **_settings(config, batches, trp)}
    journal = Journal()
    if checkpoint is not None and checkpoint.is_file():
        journal = read_snapshot(checkpoint, model, optimizer, trp, settings)
        if journal.log and (was := journal.log[-1].precision) not in (None, precision):
            warnings.warn(f"this training began in {was} and goes on in {precision}: name one as precision", stacklevel=2)
    together = dist.is_available() and dist.is_initialized()
    shared = nn.parallel.DistributedDataParallel(model) if together else model
    forward = torch.compile(shared, dynamic=False) if config.compile else shared
    total = config.epochs * len(batches)

    def write() -> None:
        if checkpoint is not None and (not together or dist.get_rank() == 0):
            write_snapshot(checkpoint, model, optimizer, trp, settings, journal)

    model.train()
    attached = nullcontext() if trp is None else _attached(trp, optimizer)
    with attached, programs_of_one_code(PROGRAMS), _compiling():
        for epoch in range(len(journal.log), config.epochs):
            begin = time.perf_counter() - journal.seconds
            losses = torch.tensor(journal.loss_sum, device=device)
            stream = _Awaited(batches.epoch(epoch, journal.step), journal.waited)
            for i, (images, labels) in enumerate(stream, journal.step):
                lr = learning_rate(config, epoch * len(batches) + i, total)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                    logits = forward(images)
                    answers = answers_of(images) if answers_of is not None else None
                loss = loss_of(logits.float(), labels, answers, config)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses += loss.detach()
                if on_step is not None:
                    plan = None if trp is None else trp.plan
                    on_step(Progress(epoch, i + 1, len(batches), lr, loss.detach(), batches.batch, plan))
                if config.checkpoint_steps and (i + 1) % config.checkpoint_steps == 0 and i + 1 < len(batches):
                    sum_so_far, seconds = _over_processes(losses), time.perf_counter() - begin
                    journal = Journal(journal.log, i + 1, _finite(sum_so_far, epoch, config), seconds, stream.seconds)
                    write()
            mean, seconds = _finite(_over_processes(losses), epoch, config) / len(batches), time.perf_counter() - begin
            ranks = trp.plan.ranks if trp is not None and trp.plan is not None else {}
            entry = EpochLog(epoch, mean, round(seconds, 2), ranks, round(stream.seconds / seconds, 4), precision, by)
            journal = Journal([*journal.log, entry])
            write()
    return journal.log


@contextmanager
def _compiling() -> Iterator[None]:
    """Tell what to do where torch.compile has no compiler, say."""
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException  # slow to import

        if not isinstance(error, TorchDynamoException):
            raise
        raise RankPruneError(
            f"torch.compile does not work here ({reason_of(error)}); train without it, by --no-compile or compile = false in "
            "[training]"
        ) from error


class _Awaited:
    """Iterates over batches and adds up the seconds that they were waited for."""

    def __init__(self, stream: Iterable[tuple[Tensor, Tensor]], seconds: float) -> None:
        self.stream, self.seconds = stream, seconds

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        begin = time.perf_counter()
        for batch in self.stream:
            self.seconds += time.perf_counter() - begin
            yield batch
            begin = time.perf_counter()


def _over_processes(losses: Tensor) -> Tensor:
    """The mean over all processes, in place, so that a resumed run adds to the same value."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    return losses


def _finite(losses: Tensor, epoch: int, config: TrainConfig) -> float:
    value = float(losses)
    if not math.isfinite(value):
        raise RankPruneError(f"the loss is {value} in epoch {epoch}: lower the learning rate (lr={config.lr})")
    return value


@contextmanager
def _attached(trp: TRP, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    trp.attach(optimizer)
    try:
        yield
    finally:
        trp.detach()


def _settings(config: TrainConfig, batches: Batches, trp: TRP | None) -> dict[str, Any]:
    """All that has to be the same for a run to go on as it began."""
    return {"training": asdict(config), "data": batches.settings, "trp": trp and trp.settings}
