"""Decomposition and int8 together: accuracy, bytes and ms of a trained network, dense and decomposed, float32 and int8.

Takes a finished run of the recipes: its dense.safetensors of the reference run and its artefact. Beside it ResNet-18 at 224 x
224 with random weights, whose channels are many enough for the clock.

    RANKPRUNE_DATA=... python benchmarks/int8.py benchmarks/experiments/resnet20-ours-spatial-2.84x-distilled.toml
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankprune as rp
from rankprune.backends import BACKENDS, FileBackend, Program
from rankprune.backends.onnxruntime import quantize_onnx
from rankprune.recipes.batches import eval_batches
from rankprune.recipes.data import images_of
from rankprune.recipes.experiment import Experiment, Folders
from rankprune.recipes.images import load_images
from rankprune.recipes.networks import RUN, build, load_weights
from rankprune.recipes.record import provenance, write
from rankprune.rules import parse_rule
from rankprune.timing import spread, time_together

SEED, BATCH, CALIBRATION, ROUND_TO, ROUNDS = 0, 64, 512, 16, 31


def run_of(description: str | None) -> tuple[Experiment, Folders]:
    """The finished run that the command line names, and the folders it is in."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="its TOML file")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    e = Experiment.read(options.experiment)
    return e if options.seed is None else e.with_seed(options.seed), Folders.from_environment(options.runs)


def trained(e: Experiment, folders: Folders) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """The dense and the decomposed network of a finished run, and batches of training images to calibrate on."""
    images = load_images(images_of(e, folders.data), "train").subset(torch.arange(CALIBRATION))
    classes = len(images.classes)
    dense, small = build(e.model, classes), rp.load(folders.runs / e.name / "artefact", build(e.model, classes))
    load_weights(dense, e.reference or f"{RUN}{e.name}", folders.models, folders.runs)
    return dense, small, [batch for batch, _ in eval_batches(images, BATCH)]


def accuracy(program: Callable[[Tensor], list[Tensor]], batches: list[tuple[Tensor, Tensor]]) -> float:
    """Top-1 in percent."""
    right = sum(int((program(images)[0].argmax(1) == labels).sum()) for images, labels in batches)
    return 100 * right / sum(len(labels) for _, labels in batches)


def rows(dense: nn.Module, small: nn.Module, calibration: list[Tensor]) -> Iterator[tuple[dict[str, Any], Program]]:
    """Bytes and milliseconds of each form of a network, timed in turn, and the form as a program."""
    backend = BACKENDS["onnxruntime"]
    assert isinstance(backend, FileBackend)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, network in (("dense", dense.eval()), ("decomposed", small.eval())):
            files[f"{name}, float32"] = Path(folder) / f"{name}.onnx"
            files[f"{name}, int8"] = Path(folder) / f"{name}-int8.onnx"
            rp.export_onnx(network, calibration[0], files[f"{name}, float32"])
            quantize_onnx(files[f"{name}, float32"], files[f"{name}, int8"], calibration)
        programs = {name: backend.read(file, calibration[0]) for name, file in files.items()}
        times = time_together(list(programs.values()), calibration[0], rounds=ROUNDS)
        for (name, program), ms in zip(programs.items(), times, strict=True):
            size = files[name].stat().st_size
            yield {"network": name, "bytes": size, "ms": statistics.median(ms), "spread": spread(ms)}, program


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    accuracy = f"{row['top1']:6.2f} %" if "top1" in row else " " * 8
    print(f"{row['network']:22} {accuracy} {row['bytes']:11,} bytes {row['ms']:7.2f} ms, spread {row['spread']:.0%}")


def main() -> None:
    """Measure, print, and write the result."""
    e, folders = run_of(__doc__)
    test = list(eval_batches(load_images(images_of(e, folders.data), "test"), BATCH))[:-1]  # whole batches
    dense, small, calibration = trained(e, folders)
    found = []
    for row, program in rows(dense, small, calibration):
        found.append({**row, "top1": accuracy(program, test)})
        show(found[-1])
    torch.manual_seed(SEED)
    x = torch.zeros(1, 3, 32, 32)
    costs = {"macs_dense": rp.count(dense, x).macs, "macs": rp.count(small, x).macs}
    wide, photographs = build("resnet18", 1000), [torch.randn(1, 3, 224, 224) for _ in range(8)]
    plan = rp.make_plan(wide, photographs[0], scheme="spatial", rule=parse_rule(e.trp.rule), round_to=ROUND_TO)
    untrained = [row for row, _ in rows(wide, rp.decompose(wide, plan), photographs)]
    for row in untrained:
        show(row)
    config = {
        "experiment": e.name,
        "test_images": len(test) * BATCH,
        "calibration_images": CALIBRATION,
        "batch": BATCH,
    }
    config |= {"rounds": ROUNDS, "resnet18_224": {"rule": e.trp.rule, "scheme": "spatial", "round_to": ROUND_TO}}
    of_wide = {"macs_dense": plan.macs_dense, "macs": plan.macs, "rows": untrained}
    result = {"benchmark": "int8", "config": config, "seed": SEED, "rows": found, **costs, "resnet18_224": of_wide}
    write({**result, **provenance()}, Path(__file__).parent / "results" / "int8.json")


if __name__ == "__main__":
    main()
