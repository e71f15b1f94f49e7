"""Where the time goes in ONNX Runtime: of each network what every kind of operation takes, and what it could take at least.

The least is a roofline: multiply-accumulates at the rate of a large matrix product, or bytes at that of the fastest copy,
whichever takes longer, both measured on as many threads before and after. Networks: ResNet-18 and ResNet-50 at 224 x 224 of
random weights, dense and with ranks by MACs and by time; and ResNet-20 of a finished run of the recipes, batch 64, in float32
and int8. All forms of a network are run in turn.

    RANKPRUNE_DATA=... python benchmarks/roofline.py benchmarks/experiments/resnet20-ours-spatial-2.84x-distilled.toml
"""

import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from int8 import run_of, trained
from torch import Tensor

import rankprune as rp
from rankprune.backends.onnxruntime import quantize_onnx, session_options
from rankprune.recipes.experiment import Experiment, Folders
from rankprune.recipes.networks import build
from rankprune.recipes.record import provenance, write
from rankprune.rules import Candidate, Choice, Cost, RankRule

RESULT = Path(__file__).parent / "results" / "roofline.json"
SEED, WARM_UP, CALLS = 0, 5, 30


def rates() -> dict[str, float]:
    """Multiply-accumulates and bytes each nanosecond that this processor does at best on torch's threads.

    Copies are of a quarter of a megabyte, which stays in the caches, up to 256.
    """
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    copies = []
    for count in (2**16, 2**18, 2**20, 2**22, 2**26):
        source = torch.randn(count)
        target = torch.empty_like(source)
        copies.append(2 * 4 * count / _fastest(lambda target=target, source=source: target.copy_(source)))
    return {"macs_per_ns": 2048**3 / _fastest(lambda: a @ b), "bytes_per_ns": max(copies)}


def _fastest(work: Callable[[], object]) -> float:
    def once() -> float:
        begin = time.perf_counter_ns()
        work()
        return time.perf_counter_ns() - begin

    return min(once() for _ in range(12))


Forms = Mapping[str, tuple[Path, Tensor]]
"""Files of one network in several forms, with their inputs."""


def profiles(forms: Forms) -> dict[str, list[dict[str, Any]]]:
    """The events of CALLS runs of each file, in turn, after a warm-up: a change of the machine's speed hits all alike."""
    sessions = {}
    for number, (name, (file, _)) in enumerate(forms.items()):
        options = session_options()
        options.enable_profiling = True
        options.profile_file_prefix = str(file.with_name(f"profile-{number}"))
        sessions[name] = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    for _ in range(WARM_UP + CALLS):
        for name, session in sessions.items():
            session.run(None, {session.get_inputs()[0].name: forms[name][1].numpy()})
    found = {name: json.loads(Path(session.end_profiling()).read_text()) for name, session in sessions.items()}
    return {
        name: [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        for name, events in found.items()
    }


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


def breakdown(events: Sequence[dict[str, Any]], rate: Mapping[str, float]) -> list[dict[str, Any]]:
    """For each kind of operation: how many there are, milliseconds a call, the least by the roofline, and what it computes."""
    nodes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        nodes[event["name"]].append(event)
    kinds: dict[str, dict[str, Any]] = {}
    for calls in nodes.values():
        row = kinds.setdefault(kind_of(calls[0]), {"count": 0, "ms": 0.0, "least_ms": 0.0, "macs": 0})
        macs, moved = macs_and_bytes(calls[0])
        row["count"] += 1
        row["ms"] += statistics.median(e["dur"] for e in calls[WARM_UP:]) / 1e3
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


def photographs(folder: Path, name: str) -> Forms:
    """A ResNet at 224 x 224, as `make bench-latency` decomposed it."""
    x, forms = torch.randn(1, 3, 224, 224), {}
    plans = json.loads((RESULT.parent / f"latency-{name}-224.json").read_text())["plans"]
    dense = build(name, 1000).eval()
    for text, chosen in {"dense": {}, **plans}.items():
        file = folder / f"{name}-{len(forms)}.onnx"
        rp.export_onnx(rp.decompose(dense, rp.make_plan(dense, x, scheme="auto", rule=Given(chosen))), x, file)
        forms[f"{name}, {text}"] = file, x
    return forms


def small_images(folder: Path, e: Experiment, folders: Folders) -> Forms:
    """The trained ResNet-20, dense and decomposed, in float32 and int8."""
    forms = {}
    dense, small, calibration = trained(e, folders)
    for text, network in {"dense": dense.eval(), "decomposed": small.eval()}.items():
        file, quantised = folder / f"{text}.onnx", folder / f"{text}-int8.onnx"
        rp.export_onnx(network, calibration[0], file)
        quantize_onnx(file, quantised, calibration)
        forms[f"{e.model}, {text}, float32"] = file, calibration[0]
        forms[f"{e.model}, {text}, int8"] = quantised, calibration[0]
    return forms


def main() -> None:
    """Measure, print, and write the result."""
    torch.manual_seed(SEED)
    rows: list[dict[str, Any]] = []
    e, folders = run_of(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        makers = (
            partial(photographs, name="resnet18"),
            partial(photographs, name="resnet50"),
            partial(small_images, e=e, folders=folders),
        )
        for maker in makers:
            forms = maker(folder)
            before, found, after = rates(), profiles(forms), rates()
            rate = {key: max(before[key], after[key]) for key in before}
            print(f"{2 * rate['macs_per_ns']:.0f} GFLOP/s, {rate['bytes_per_ns']:.1f} GB/s")
            for network, events in found.items():
                kinds = breakdown(events, rate)
                total = {key: sum(kind[key] for kind in kinds) for key in ("ms", "least_ms", "macs")}
                rows.append({"network": network, **total, **rate, "kinds": kinds})
                print(f"{network}: {total['ms']:.1f} ms, at least {total['least_ms']:.1f}")
                for kind in kinds:
                    share = f"{kind['macs'] / kind['ms'] / 1e6 / rate['macs_per_ns']:.0%}" if kind["macs"] else ""
                    print(f"  {kind['kind']:28} {kind['count']:3} {kind['ms']:7.2f} ms {kind['least_ms']:7.2f} {share}")
    config = {"experiment": e.name, "warm_up": WARM_UP, "calls": CALLS}
    write({"benchmark": "roofline", "config": config, "seed": SEED, "rows": rows, **provenance()}, RESULT)


if __name__ == "__main__":
    main()
