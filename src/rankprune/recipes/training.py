"""The training loop of the recipes: SGD with a cosine schedule, any attached TRP, checkpoints, exact resume."""

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from rankprune.errors import CheckpointError, RankPruneError
from rankprune.recipes.batches import TrainBatches
from rankprune.trp import TRP

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    `precision` is that of autocast; "auto" takes bfloat16 where the processor multiplies it natively. `distill` is the weight
    of the teacher's softened answers, at `temperature`, against that of the labels (Hinton et al. 2015); 0 needs no teacher.
    """

    epochs: int = 30
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    distill: float = 0.0
    temperature: float = 4.0
    precision: Precision = "auto"
    compile: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise RankPruneError(f"epochs={self.epochs}: give 0 or more")
        if not self.lr > 0:
            raise RankPruneError(f"lr={self.lr}: give a positive learning rate")
        if self.precision not in get_args(Precision):
            raise RankPruneError(f"precision={self.precision!r}: choose one of {', '.join(get_args(Precision))}")
        if not 0 <= self.distill <= 1 or not self.temperature > 0:
            raise RankPruneError(
                f"distill={self.distill}, temperature={self.temperature}: give a weight from 0 to 1, and a positive temperature"
            )


@dataclass(frozen=True)
class Progress:
    """Where a run stands, after each step: `loss` is a tensor still on its device, so that looking at it is what costs."""

    epoch: int
    step: int
    steps_per_epoch: int
    lr: float
    loss: Tensor


@dataclass(frozen=True)
class EpochLog:
    """One finished epoch: mean training loss, seconds taken, and the ranks then in force (empty before a projection)."""

    epoch: int
    loss: float
    seconds: float
    ranks: dict[str, int]


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones here; emulated ones are slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        known = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return False


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Linear warm-up, then a cosine from config.lr to 0 over `total` steps."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / max(1, total - config.warmup_steps)))


def train(
    model: nn.Module,
    batches: TrainBatches,
    config: TrainConfig,
    *,
    trp: TRP | None = None,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> list[EpochLog]:
    """Train `model` in place and return a log of its epochs.

    With torch.distributed initialised, all processes call it, each with its part of the batches; gradients are averaged over
    them (DistributedDataParallel), and the first one writes the checkpoint, in a folder that all of them see.

    Args:
        trp: attached to the optimizer for the length of the training, then detached; finalize() is left to the caller.
        teacher: the network whose answers config.distill weighs; run in eval mode, otherwise left as it is.
        checkpoint: written after every epoch. If it is there at the start and of the same config, the run goes on from it and
            ends as it would have ended uninterrupted.

    Raises:
        CheckpointError: if the checkpoint is of a run with another config.
        RankPruneError: if there are fewer images than one batch, or a teacher is missing.
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
    taught = _taught(teacher, config) if teacher is not None and config.distill else None  # before the model changes
    settings = _settings(config, batches, trp)
    log: list[EpochLog] = []
    if checkpoint is not None and checkpoint.is_file():
        log = _resume(checkpoint, model, optimizer, trp, settings)
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and has_native_bfloat16(device))
    together = dist.is_available() and dist.is_initialized()
    shared = nn.parallel.DistributedDataParallel(model) if together else model
    forward = torch.compile(shared) if config.compile else shared
    total = config.epochs * len(batches)
    model.train()
    with nullcontext() if trp is None else _attached(trp, optimizer):
        for epoch in range(len(log), config.epochs):
            begin, losses = time.perf_counter(), torch.zeros((), device=device)
            for i, (images, labels) in enumerate(batches.epoch(epoch)):
                lr = learning_rate(config, epoch * len(batches) + i, total)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    logits = forward(images)
                    answers = taught(images) if taught is not None else None
                loss = loss_of(logits.float(), labels, answers, config)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses += loss.detach()
                if on_step is not None:
                    on_step(Progress(epoch, i + 1, len(batches), lr, loss.detach()))
            if together:
                dist.all_reduce(losses)
                losses /= dist.get_world_size()
            mean = float(losses) / len(batches)
            if not math.isfinite(mean):
                raise RankPruneError(f"the loss is {mean} after epoch {epoch}: lower the learning rate (lr={config.lr})")
            seconds = round(time.perf_counter() - begin, 2)
            log.append(EpochLog(epoch, mean, seconds, trp.plan.ranks if trp is not None and trp.plan is not None else {}))
            if checkpoint is not None and (not together or dist.get_rank() == 0):
                _write(checkpoint, model, optimizer, trp, settings, log)
    return log


def loss_of(logits: Tensor, labels: Tensor, answers: Tensor | None, config: TrainConfig) -> Tensor:
    """Cross-entropy with the labels, mixed by config.distill with the divergence from the teacher's softened answers.

    The divergence is scaled by the square of the temperature, so that its gradient does not fade with it (Hinton et al. 2015).
    Shapes: logits and answers (b, classes), labels (b,) -> ().
    """
    loss = F.cross_entropy(logits, labels)
    if answers is None:
        return loss
    t = config.temperature
    divergence = F.kl_div(
        (logits / t).log_softmax(1), (answers.float() / t).log_softmax(1), reduction="batchmean", log_target=True
    )
    return (1 - config.distill) * loss + config.distill * t * t * divergence


def _taught(teacher: nn.Module, config: TrainConfig) -> Callable[[Tensor], Tensor]:
    """The answers of a copy of the teacher in eval mode, without gradients."""
    frozen = copy.deepcopy(teacher).eval().requires_grad_(False)
    forward = torch.compile(frozen) if config.compile else frozen

    def answers(images: Tensor) -> Tensor:
        with torch.no_grad():
            return forward(images)

    return answers


@contextmanager
def _attached(trp: TRP, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    trp.attach(optimizer)
    try:
        yield
    finally:
        trp.detach()


def _settings(config: TrainConfig, batches: TrainBatches, trp: TRP | None) -> str:
    """All that has to be the same for a run to go on as it began."""
    data = {
        "images": len(batches.labels),
        "batch": batches.batch,
        "seed": batches.seed,
        "pad": batches.pad,
        "flip": batches.flip,
    }
    return json.dumps({"training": asdict(config), "data": data, "trp": trp and trp.settings}, sort_keys=True)


def _write(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, trp: TRP | None, settings: str, log: list[EpochLog]
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "trp": None if trp is None else trp.state_dict(),
        "settings": settings,
        "log": [asdict(entry) for entry in log],
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")  # a kill while writing leaves the last whole checkpoint in place
    torch.save(state, part)
    os.replace(part, path)


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, trp: TRP | None, settings: str) -> list[EpochLog]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler fail in any way
        raise CheckpointError(f"the checkpoint {str(path)!r} is damaged; delete it to begin again") from error
    if not isinstance(state, dict) or "settings" not in state:
        raise CheckpointError(f"{str(path)!r} is not a checkpoint of this loop; delete it, or choose another folder")
    if state["settings"] != settings:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is of a run with another config, {state['settings']} instead of {settings}; "
            "delete it, or choose another folder"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if trp is not None:
        trp.load_state_dict(state["trp"])
    torch.set_rng_state(state["rng"])
    if state["rng_cuda"]:
        torch.cuda.set_rng_state_all(state["rng_cuda"])
    return [EpochLog(**entry) for entry in state["log"]]
