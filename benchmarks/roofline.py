"""Where the time goes in ONNX Runtime: of each network what every kind of operation takes, and what it could take at least.

The least is a roofline: multiply-accumulates by the rate of a large matrix product, or bytes by the rate of a large copy,
whichever takes longer, both measured on as many threads right before each network. Networks: ResNet-18 and ResNet-50 at
224 x 224 of random weights, dense and with ranks by MACs and by time; and ResNet-20 of a finished run of the recipes, batch
64, in float32 and int8.

    RANKPRUNE_DATA=... python benchmarks/roofline.py benchmarks/experiments/resnet20-ours-spatial-2.84x-distilled.toml
"""

import json
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

import rankprune as rp
from rankprune.backends.onnxruntime import quantize_onnx
from rankprune.ranks import Candidate, Choice, Cost, RankRule
from rankprune.recipes.batches import Normalize, eval_batches
from rankprune.recipes.experiment import Experiment, Folders
from rankprune.recipes.images import IMAGENET_MEAN, IMAGENET_STD, load_images
from rankprune.recipes.networks import build, load_weights
from rankprune.recipes.runner import provenance, write

RESULT = Path(__file__).parent / "results" / "roofline.json"
BATCH, CALIBRATION, CALLS = 64, 512, 30


def rates() -> dict[str, float]:
    """Multiply-accumulates and bytes each nanosecond that this processor can do on torch's threads."""
    a, b, source = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.randn(2**26)
    target = torch.empty_like(source)
    products, copies = _fastest(lambda: a @ b), _fastest(lambda: target.copy_(source))
    return {"macs_per_ns": 2048**3 / products, "bytes_per_ns": 2 * 4 * 2**26 / copies}


def _fastest(work: Callable[[], object]) -> float:
    def once() -> float:
        begin = time.perf_counter_ns()
        work()
        return time.perf_counter_ns() - begin

    return min(once() for _ in range(12))


def profile(file: Path, x: Tensor) -> list[dict[str, Any]]:
    """The events of CALLS runs of an ONNX file, after a warm-up."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_profiling = True
    options.profile_file_prefix = str(file.with_suffix(""))
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    for _ in range(CALLS + 5):
        session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    return [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]


def kind_of(event: dict[str, Any]) -> str:
    """What is reported as one: convolutions by the shape of their kernel, all else by its name."""
    name, shapes = event["args"]["op_name"], _shapes(event["args"]["input_type_shape"])
    if "Conv" not in name:
        return name
    weight = _weight(shapes)
    return f"{name} {weight[2]} x {weight[3]}" if weight else name


def macs_and_bytes(event: dict[str, Any]) -> tuple[int, int]:
    """The multiply-accumulates of a convolution or product, and the bytes that any operation reads and writes.

    Convolutions in int8 do not tell the shape of their weights, and count as none.
    """
    args = event["args"]
    inputs, outputs = _shapes(args["input_type_shape"]), _shapes(args["output_type_shape"])
    moved = int(args["activation_size"]) + int(args["parameter_size"]) + int(args["output_size"])
    weight = _weight(inputs) if "Conv" in args["op_name"] else None
    if weight:
        return math.prod(outputs[0]) * math.prod(weight[1:]), moved
    if args["op_name"] in ("Gemm", "MatMul", "FusedMatMul"):
        return math.prod(outputs[0]) * inputs[0][-1], moved
    return 0, moved


def _weight(inputs: list[list[int]]) -> list[int] | None:
    return next((shape for shape in inputs[1:] if len(shape) == 4), None)


def _shapes(described: list[dict[str, list[int]]]) -> list[list[int]]:
    return [shape for entry in described for shape in entry.values()]


def breakdown(file: Path, x: Tensor, rate: dict[str, float]) -> list[dict[str, Any]]:
    """For each kind of operation: how many there are, milliseconds a call, the least by the roofline, and what it computes."""
    nodes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in profile(file, x):
        nodes[event["name"]].append(event)
    kinds: dict[str, dict[str, Any]] = {}
    for events in nodes.values():
        row = kinds.setdefault(kind_of(events[0]), {"count": 0, "ms": 0.0, "least_ms": 0.0, "macs": 0})
        macs, moved = macs_and_bytes(events[0])
        row["count"] += 1
        row["ms"] += statistics.median(e["dur"] for e in events[5:]) / 1e3
        row["least_ms"] += max(macs / rate["macs_per_ns"], moved / rate["bytes_per_ns"]) / 1e6
        row["macs"] += macs
    return sorted(({"kind": kind, **row} for kind, row in kinds.items()), key=lambda row: -row["ms"])


class Given(RankRule):
    """Ranks that were chosen before."""

    def __init__(self, chosen: Mapping[str, tuple[str, int]]) -> None:
        self.chosen = chosen

    def choose(self, layers: Mapping[str, Sequence[Candidate]], network: Cost) -> dict[str, Choice]:
        """These, and no others."""
        return {name: Choice(*self.chosen[name]) if name in self.chosen else Choice(reason="as before") for name in layers}


def photographs(folder: Path) -> Iterator[tuple[str, Path, Tensor]]:
    """ResNets at 224 x 224 as files, as `make bench-latency` decomposed them."""
    x, file = torch.randn(1, 3, 224, 224), folder / "network.onnx"
    for name in ("resnet18", "resnet50"):
        plans = json.loads((RESULT.parent / f"latency-{name}-224.json").read_text())["plans"]
        dense = build(name, 1000).eval()
        networks = {"dense": dense} | {
            text: rp.decompose(dense, rp.make_plan(dense, x, rule=Given(chosen))) for text, chosen in plans.items()
        }
        for text, network in networks.items():
            rp.export_onnx(network, x, file)
            yield f"{name}, {text}", file, x


def small_images(folder: Path, experiment: Path) -> Iterator[tuple[str, Path, Tensor]]:
    """The trained ResNet-20, dense and decomposed, in float32 and int8."""
    folders, e = Folders.from_environment(), Experiment.read(experiment)
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
    training = load_images(folders.data / "cifar10", "train").subset(torch.arange(CALIBRATION))
    calibration = [images for images, _ in eval_batches(training, BATCH, normalize)]
    dense, small = build(e.model, 10), rp.load(folders.runs / e.name / "artefact", build(e.model, 10))
    load_weights(dense, e.reference or e.start or "", folders.models, folders.runs)
    for text, network in {"dense": dense.eval(), "decomposed": small.eval()}.items():
        file, quantised = folder / f"{text}.onnx", folder / f"{text}-int8.onnx"
        rp.export_onnx(network, calibration[0], file)
        quantize_onnx(file, quantised, calibration)
        yield f"{e.model}, {text}, float32", file, calibration[0]
        yield f"{e.model}, {text}, int8", quantised, calibration[0]


def main() -> None:
    """Measure, print, and write the result."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for network, file, x in chain(photographs(folder), small_images(folder, Path(sys.argv[1]))):
            rate = rates()
            kinds = breakdown(file, x, rate)
            total = {key: sum(kind[key] for kind in kinds) for key in ("ms", "least_ms", "macs")}
            rows.append({"network": network, **total, **rate, "kinds": kinds})
            best = f"{2 * rate['macs_per_ns']:.0f} GFLOP/s, {rate['bytes_per_ns']:.1f} GB/s"
            print(f"{network}: {total['ms']:.1f} ms, at least {total['least_ms']:.1f} at {best}")
            for kind in kinds:
                rate_of = f"{2 * kind['macs'] / kind['ms'] / 1e6:.0f} GFLOP/s" if kind["macs"] else ""
                print(f"  {kind['kind']:28} {kind['count']:3} {kind['ms']:7.2f} ms {kind['least_ms']:7.2f} {rate_of}")
    write({"benchmark": "roofline", "experiment": Path(sys.argv[1]).stem, "rows": rows, **provenance()}, RESULT)


if __name__ == "__main__":
    main()
