"""How long one projection takes, against one torch.linalg.svd a layer, and what that makes of a training step.

For every network and scheme: some steps of training on real images under TRP, in small batches; then, from the very same
weights, in turn in one process, a projection as the hooks do it (factorisation from the last one's vectors, ranks by the
rule, new weights, nuclear factors), one without anything known from before, torch.linalg.svd of every layer's matrix, and a
training step on a full batch.

    RANKPRUNE_DATA=... python benchmarks/projection.py [--networks resnet20 resnet18 resnet50] [--growth]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import rankprune as rp
from rankprune.linalg import bases, nuclear_subgradient, project
from rankprune.recipes.batches import TrainBatches
from rankprune.recipes.experiment import Folders
from rankprune.recipes.imagenet_resnet import resnet18, resnet50
from rankprune.recipes.images import load_images
from rankprune.recipes.record import provenance, write
from rankprune.recipes.resnet import resnet20
from rankprune.schemes import SCHEMES

NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], str, int, int]] = {
    "resnet20": (resnet20, "cifar10", 32, 128),
    "resnet18": (lambda: resnet18(10), "imagenette", 112, 64),
    "resnet50": (lambda: resnet50(10), "imagenette", 112, 64),
}
SEED, SMALL_BATCH = 0, 16
RULE = rp.Budget(macs=0.4)
RESULT = Path(__file__).parent / "results" / "projection.json"


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def compare(name: str, scheme: str, folders: Folders, rounds: int, projections: int) -> dict[str, Any]:
    """The times of one network under one scheme: medians over `rounds`, in seconds."""
    torch.manual_seed(SEED)
    build, dataset, size, batch = NETWORKS[name]
    model = build()
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    reduced = folders.data / f"{dataset}{size}"  # photographs whose shorter side is this already
    images = load_images(reduced if reduced.is_dir() else folders.data / dataset, "train", size)
    small, full = (iter(TrainBatches(images, b).epoch(0)) for b in (SMALL_BATCH, batch))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x = torch.zeros(1, 3, size, size)
    trp = rp.TRP(model, rule=RULE, scheme=scheme, every=20, nuclear=3e-4, example_inputs=x)
    trp.attach(optimizer)

    def step(stream: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        images, labels = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    for _ in range(20 * (projections + 1) - 1):  # up to the step before a projection
        step(small)
    trp.detach()
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, trp.state_dict()
    assert trp.plan is not None
    matrices = [
        SCHEMES[scheme].to_matrices(layer, layer.get_parameter("weight").detach())
        for layer_name, layer in model.named_modules()
        if layer_name in trp._factorizer.layers
    ]

    def restore(**changes: Any) -> None:
        model.load_state_dict(weights)
        trp.load_state_dict({**state, **changes})

    def svds() -> None:
        for matrix in matrices:
            torch.linalg.svd(matrix, full_matrices=False)

    times: dict[str, list[float]] = {"projection": [], "projection_cold": [], "svd": [], "step": []}
    for i in range(rounds + 1):
        restore()
        taken = {"projection": seconds(trp.project)}
        restore(starts=None)  # as the first one of a training
        taken |= {"projection_cold": seconds(trp.project), "svd": seconds(svds)}
        taken["step"] = seconds(lambda: step(full))
        if i:  # the first is a warm-up
            for key, value in taken.items():
                times[key].append(value)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {
        "network": name,
        "scheme": scheme,
        "batch": batch,
        "size": size,
        **{f"{key}_s": value for key, value in medians.items()},
        "times_faster": medians["svd"] / medians["projection"],
        "overhead_every_20": medians["projection"] / (20 * medians["step"]),
        "overhead_every_1": medians["projection"] / medians["step"],
    }


def growth(rounds: int = 3) -> list[dict[str, Any]]:
    """One matrix of each size: its low-rank part known, a little noise on top, as between two projections."""
    rows = []
    for shape in ((48, 48), (192, 192), (576, 576), (768, 1536), (1536, 1536), (2048, 4096), (4096, 4096), (4096, 11008)):
        torch.manual_seed(SEED)
        rank = min(shape) // 5
        low = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
        start = [torch.linalg.qr(low if shape[0] > shape[1] else low[:, : 2 * rank]).Q[None, :, :rank]]
        a = (low + 0.1 * low.std() * torch.randn(shape))[None]

        def ours(a: torch.Tensor = a, start: list[Any] = start, rank: int = rank) -> None:
            basis = bases([a], ["a"], start)[0]
            project(a, basis, rank)
            nuclear_subgradient(a, basis, rank)

        many = rounds if min(shape) < 2000 else 1
        ours()
        mine, svd = [], []
        for _ in range(many):
            mine.append(seconds(ours))
            svd.append(seconds(lambda a=a: torch.linalg.svd(a, full_matrices=False)))
        rows.append({"rows": shape[0], "columns": shape[1], "projection_s": min(mine), "svd_s": min(svd)})
        print(
            f"{shape[0]:5} x {shape[1]:5}  {min(mine):8.4f} s  svd {min(svd):8.4f} s  {min(svd) / min(mine):6.1f}x", flush=True
        )
    return rows


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--projections", type=int, default=2, help="projections made in training before the measured one")
    parser.add_argument("--growth", action="store_true", help="also measure single matrices, up to 4096 x 11008")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = []
    for name in options.networks:
        for scheme in ("spatial", "channel"):
            rows.append(compare(name, scheme, Folders.from_environment(), options.rounds, options.projections))
            r = rows[-1]
            print(
                f"{name} {scheme}: step {r['step_s']:.3f} s, projection {r['projection_s']:.3f} s (cold "
                f"{r['projection_cold_s']:.3f}), svd {r['svd_s']:.3f} s: {r['times_faster']:.1f} times faster; "
                f"overhead {r['overhead_every_20']:.1%} at every=20, {r['overhead_every_1']:.0%} at every=1",
                flush=True,
            )
    config = {"rule": repr(RULE), "every": 20, "rounds": options.rounds, "projections": options.projections}
    result = {"benchmark": "projection", "config": config, "seed": SEED, "networks": rows}
    result |= {"growth": growth() if options.growth else [], **provenance()}
    print(f"result  {write(result, options.out)}")


if __name__ == "__main__":
    main()
