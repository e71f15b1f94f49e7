"""The demonstration: the digits that ship with scikit-learn, a small residual network, made smaller in one shot and by TRP."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.cost import count
from rankprune.decompose import decompose
from rankprune.errors import MissingExtraError
from rankprune.plan import Plan
from rankprune.planner import make_plan
from rankprune.recipes.batches import Normalize, TrainBatches, eval_batches
from rankprune.recipes.evaluation import top1
from rankprune.recipes.images import ImageSet
from rankprune.recipes.progress import Progress
from rankprune.recipes.resnet import CifarResNet
from rankprune.recipes.schedule import TrainConfig
from rankprune.recipes.training import train
from rankprune.rules import Budget
from rankprune.timing import measure_together
from rankprune.trp import TRP

NORMALIZE = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Row:
    """One line of the table: accuracy in per cent, MACs of one image, parameters, milliseconds of one batch."""

    name: str
    top1: float
    macs: int
    params: int
    ms: float


@dataclass(frozen=True)
class Demonstration:
    """What the demonstration made; `dense` and `trained` are the networks before decomposition, `small` the one after TRP."""

    rows: tuple[Row, ...]
    dense: nn.Module
    trained: nn.Module
    small: nn.Module
    plan: Plan
    history: list[tuple[int, dict[str, int]]]
    batch: int


def digits() -> tuple[ImageSet, ImageSet]:
    """The 1,797 digits, 8x8 pixels in grey on three equal channels, as a training set and a test set of 360.

    Raises:
        MissingExtraError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo") from error
    bunch: Any = load_digits()
    grey = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)
    data = ImageSet(
        grey[..., None].expand(-1, -1, -1, 3).contiguous(), torch.from_numpy(bunch.target).long(), tuple("0123456789")
    )
    return data.split(holdout=360)


def demonstrate(
    *, epochs: int = 15, fraction: float = 0.3, seed: int = 0, on_step: Callable[[str, Progress], None] | None = None
) -> Demonstration:
    """Train a ResNet-14, twice as wide as usual, and decompose it; train another with TRP to the same MACs and decompose that.

    All start from the same weights, see the same batches in the same order, and are trained for the same number of epochs;
    none is fine-tuned.

    Args:
        fraction: of the dense MACs that may remain.
        on_step: called after every step with "dense" or "TRP".
    """
    training, test = digits()
    x = next(eval_batches(test, 1, NORMALIZE))[0]
    batches = TrainBatches(training, 64, seed=seed, pad=1, flip=False, normalize=NORMALIZE)
    config = TrainConfig(epochs=epochs, lr=0.1, weight_decay=5e-4, precision="float32", compile=False, seed=seed)

    def network() -> CifarResNet:
        torch.manual_seed(seed)
        return CifarResNet(14, width=32)

    def accuracy(model: nn.Module) -> float:
        return top1(model, eval_batches(test, normalize=NORMALIZE))

    def report(name: str) -> Callable[[Progress], None] | None:
        return None if on_step is None else partial(on_step, name)

    dense, rule = network(), Budget(macs=fraction)
    train(dense, batches, config, on_step=report("dense"))
    plain = decompose(dense, make_plan(dense, x, scheme="spatial", rule=rule))

    trained = network()
    half = epochs * len(batches) // 2
    trp = TRP(trained, scheme="spatial", rule=rule, every=10, ramp=half, freeze=half, example_inputs=x)
    train(trained, batches, config, trp=trp, on_step=report("TRP"))
    small = trp.finalize()
    assert trp.plan is not None

    networks: dict[str, nn.Module] = {
        "dense": dense,
        "dense, decomposed": plain,
        "TRP, projected": trained,
        "TRP, decomposed": small,
    }
    many: Tensor = next(eval_batches(test, 256, NORMALIZE))[0]
    times = measure_together(networks, many)
    costs = {name: count(model, x) for name, model in networks.items()}
    rows = tuple(
        Row(name, accuracy(model), costs[name].macs, costs[name].params, times[name].median_ms)
        for name, model in networks.items()
    )
    return Demonstration(rows, dense, trained, small, trp.plan, trp.history, len(many))
