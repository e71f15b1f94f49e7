"""What the training recipe and TRP cost over a bare loop: ResNet-20, CIFAR-10, batch 128, a projection every 20 steps.

Both run in one process in turn, 20 steps each, on equal networks and the same images; the figure is the median over the rounds
of recipe time / bare time. The bare loop draws the same batches and does the same arithmetic, without TRP.

    RANKPRUNE_DATA=... python benchmarks/overhead.py
"""

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import rankprune as rp
from rankprune.recipes.batches import TrainBatches
from rankprune.recipes.experiment import Folders
from rankprune.recipes.images import load_images
from rankprune.recipes.progress import Progress
from rankprune.recipes.record import provenance, write
from rankprune.recipes.resnet import resnet
from rankprune.recipes.schedule import TrainConfig
from rankprune.recipes.training import train

SEED, EVERY, ROUNDS, WARM = 0, 20, 8, 2
RESULT = Path(__file__).parent / "results" / "overhead-resnet20.json"


def network() -> nn.Module:
    """A ResNet-20 as both loops start from."""
    torch.manual_seed(SEED)
    model = resnet("resnet20")
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    return model


def bare_steps(batches: TrainBatches) -> Iterator[None]:
    """The bare loop, one step at a time."""
    model = network().train()
    forward = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    for images, labels in batches.epoch(0):
        loss = F.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def main() -> None:
    """Measure, print, and write the result."""
    folders = Folders.from_environment()
    data = load_images(folders.data / "cifar10", "train")
    data = data.subset(torch.arange((ROUNDS + WARM) * EVERY * 128))
    batches = TrainBatches(data, 128)
    bare = bare_steps(batches)
    seconds: dict[str, list[float]] = {"bare": [], "recipe": []}
    begin = 0.0

    def alternate(progress: Progress) -> None:
        nonlocal begin
        if progress.step % EVERY:
            return
        now = time.perf_counter()
        for _ in range(EVERY):
            next(bare)
        after = time.perf_counter()
        if progress.step > WARM * EVERY:
            seconds["recipe"].append(now - begin)
            seconds["bare"].append(after - now)
        begin = time.perf_counter()

    model = network()
    rule = rp.Budget(macs=1 / 2.2)
    trp = rp.TRP(model, scheme="spatial", rule=rule, every=EVERY, example_inputs=torch.zeros(1, 3, 32, 32))
    train(model, batches, TrainConfig(epochs=1, precision="float32"), trp=trp, on_step=alternate)
    ratios = [ours / bare for ours, bare in zip(seconds["recipe"], seconds["bare"], strict=True)]
    result = {
        "benchmark": "overhead",
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "bare_step_ms": round(statistics.median(seconds["bare"]) / EVERY * 1e3, 1),
        "rounds": len(ratios),
        "config": {"model": "resnet20", "batch": 128, "every": EVERY, "scheme": "spatial", "rule": repr(rule), "compile": True},
        "seed": SEED,
        **provenance(),
    }
    write(result, RESULT)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
