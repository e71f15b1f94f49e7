"""What makes a pair of layers fast, one change at a time, on the 3 x 3 convolutions of ResNet-18 (224 x 224, batch 1).

Every line of the result sets a variant beside the pair as the library builds it, timed in turn within one loop:

- the order of the spatial scheme's two layers: 1 x 3 first instead of 3 x 1,
- where the stride goes: all of it in the first layer, or all of it in the second, instead of one axis each,
- ranks around a multiple of 16, of the spatial and of the channel scheme,
- channels_last (eager), BatchNorm folded (eager; ONNX files have it folded).

The first three in ONNX Runtime and in OpenVINO. A channel pair has one order, and its stride is in its first layer, for the
second sees single positions.

    python benchmarks/pairs.py [FILE.json]
"""

import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rankprune.backends import BACKENDS
from rankprune.latency.cache import NOISY
from rankprune.recipes.record import provenance, write
from rankprune.schemes import SCHEMES
from rankprune.timing import spread, time_together

SEED, ROUNDS, TRIES = 0, 31, 5
RESULT = Path(__file__).parent / "results" / "pairs.json"
LAYERS = [
    (64, 64, 1, 56, 32, 16),
    (128, 128, 1, 28, 48, 32),
    (256, 256, 1, 14, 96, 80),
    (512, 512, 1, 7, 160, 160),
    (128, 256, 2, 28, 64, 64),
]
"""Input and output channels, stride, side of the image, spatial and channel rank: about a third of the dense layer's MACs."""


def pair(scheme: str, c: int, n: int, s: int, r: int) -> nn.Sequential:
    """The pair as the library builds it."""
    return SCHEMES[scheme].pair_like(nn.Conv2d(c, n, 3, s, 1, bias=False), r)


def horizontal_first(c: int, n: int, s: int, r: int) -> nn.Sequential:
    """1 x 3 before 3 x 1."""
    return nn.Sequential(
        nn.Conv2d(c, r, (1, 3), (1, s), (0, 1), bias=False), nn.Conv2d(r, n, (3, 1), (s, 1), (1, 0), bias=False)
    )


def stride_first(c: int, n: int, s: int, r: int) -> nn.Sequential:
    """Both strides in the first layer. It skips columns that the second should see: another function, timed all the same."""
    return nn.Sequential(nn.Conv2d(c, r, (3, 1), s, (1, 0), bias=False), nn.Conv2d(r, n, (1, 3), 1, (0, 1), bias=False))


def stride_last(c: int, n: int, s: int, r: int) -> nn.Sequential:
    """Both strides in the second layer."""
    return nn.Sequential(nn.Conv2d(c, r, (3, 1), 1, (1, 0), bias=False), nn.Conv2d(r, n, (1, 3), s, (0, 1), bias=False))


def compare(backend: str, models: Mapping[str, nn.Module], x: Tensor | dict[str, Tensor]) -> list[dict[str, Any]]:
    """A row for each model, the first being what the others are set beside."""
    for parameter in (p for m in models.values() for p in m.parameters()):
        nn.init.normal_(parameter, std=0.05)
    inputs = x if isinstance(x, dict) else dict.fromkeys(models, x)
    loaded = [BACKENDS[backend].load(m.eval(), inputs[name]) for name, m in models.items()]
    programs = [lambda _, run=run, name=name: run(inputs[name]) for run, name in zip(loaded, models, strict=True)]
    times = calmest(lambda: time_together(programs, next(iter(inputs.values())), rounds=ROUNDS))
    base = statistics.median(times[0])
    return [
        {
            "variant": n,
            "backend": backend,
            "ms": statistics.median(t),
            "of_first": statistics.median(t) / base,
            "spread": spread(t),
        }
        for n, t in zip(models, times, strict=True)
    ]


def calmest(measure: Callable[[], list[list[float]]]) -> list[list[float]]:
    """Of at most TRIES the one whose largest spread is least; the first below a fifth will do."""
    tries = []
    for _ in range(TRIES):
        tries.append(measure())
        if max(map(spread, tries[-1])) < NOISY:
            break
    return min(tries, key=lambda times: max(map(spread, times)))


def main() -> None:
    """Measure, print, and write the result."""
    torch.manual_seed(SEED)
    rows = []
    for c, n, s, side, r, k in LAYERS:
        x = torch.randn(1, c, side, side)
        orders: dict[str, nn.Module] = {"spatial": pair("spatial", c, n, s, r), "1 x 3 first": horizontal_first(c, n, s, r)}
        if s > 1:
            orders |= {"stride in the first": stride_first(c, n, s, r), "stride in the second": stride_last(c, n, s, r)}
        ranks = {
            scheme: {f"{scheme} {of + d}": pair(scheme, c, n, s, of + d) for d in (0, -8, -1, 1, 8, 16)}
            for scheme, of in (("spatial", r), ("channel", k))
        }
        found = [
            row
            for backend in ("onnxruntime", "openvino")
            for variants in (orders, ranks["spatial"], ranks["channel"])
            for row in compare(backend, variants, x)
        ]
        (first, second), norm = pair("spatial", c, n, s, r).eval(), nn.BatchNorm2d(n).eval()
        assert isinstance(second, nn.Conv2d)
        folded = nn.Sequential(first, fuse_conv_bn_eval(second, norm))
        found += compare("eager", {"with BatchNorm": nn.Sequential(first, second, norm), "BatchNorm folded": folded}, x)
        plain, last = (pair("spatial", c, n, s, r) for _ in range(2))
        dense, dense_last = (nn.Conv2d(c, n, 3, s, 1, bias=False) for _ in range(2))
        for module in (last, dense_last):
            nn.utils.convert_conv2d_weight_memory_format(module, torch.channels_last)
        wide = x.to(memory_format=torch.channels_last)
        pairs = {"contiguous": plain, "channels_last": last}
        found += compare("eager", pairs, {"contiguous": x, "channels_last": wide})
        denses = {"dense, contiguous": dense, "dense, channels_last": dense_last}
        found += compare("eager", denses, {"dense, contiguous": x, "dense, channels_last": wide})
        for row in found:
            print(
                f"{c:4} {n:4} /{s} {side:3}  {row['variant']:22} {row['backend']:12} {row['ms']:7.3f} ms {row['of_first']:6.2f}"
            )
        rows += [{"layer": [c, n, s, side], **row} for row in found]
    config = {"layers": LAYERS, "rounds": ROUNDS, "tries": TRIES}
    out = Path(sys.argv[1]) if sys.argv[1:] else RESULT
    write({"benchmark": "pairs", "config": config, "seed": SEED, "rows": rows, **provenance()}, out)


if __name__ == "__main__":
    main()
