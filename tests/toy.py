"""A toy problem, and the plain loop on it whose weights every trainer has to arrive at."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import Dataset

import rankprune as rp

BATCH, BATCHES, EPOCHS = 8, 10, 2
DECAY, CLIP = 0.8, 0.05
EVERY = 4


class Net(nn.Module):
    """Returns logits, or what the Hugging Face Trainer wants if there are labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.features(x))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Data(Dataset[dict[str, Tensor]]):
    """Random images with labels, always the same."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(BATCH * BATCHES, 3, 6, 6, generator=generator)
        self.labels = torch.randint(5, (BATCH * BATCHES,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


X = Data().x[:1]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def settings(**more: Any) -> dict[str, Any]:
    """Those of TRP, but for the ramp, which differs."""
    return {"rule": rp.Energy(0.7), "scheme": "spatial", "every": EVERY, "nuclear": 1e-2, "example_inputs": X, **more}


@dataclass
class Trained:
    """A model at the end of a training, its exponential moving average, and the TRP."""

    model: nn.Module
    average: AveragedModel
    trp: rp.TRP


def plain_loop(*, clip: bool = False, accumulate: int = 1, bf16: bool = False, ramp: float = 0.5) -> Trained:
    """The whole training, with TRP attached to the optimizer; `ramp` is a share of it."""
    model, data = Net(), Data()
    optimizer = sgd(model)
    steps = BATCHES * EPOCHS // accumulate
    trp = rp.TRP(model, ramp=round(ramp * steps), **settings()).attach(optimizer)
    average = moving_average(model)
    for batch in range(BATCHES * EPOCHS):
        rows = slice(batch % BATCHES * BATCH, (batch % BATCHES + 1) * BATCH)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(data.x[rows], data.labels[rows])["loss"]
        (loss / accumulate).backward()
        if (batch + 1) % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
    return Trained(model, average, trp)


def moving_average(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY))


def same_weights(model: nn.Module, other: nn.Module) -> None:
    """Raise unless all weights are the same, bit for bit."""
    a, b = model.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def really_projected(trp: rp.TRP, steps: int) -> None:
    """Raise unless projections came at every EVERY-th of `steps` steps, and left the ranks that were chosen."""
    assert trp.steps == steps
    assert [step for step, _ in trp.history] == list(range(EVERY, steps + 1, EVERY))
    ranks = [chosen.get("head.0", 32) for _, chosen in trp.history]
    assert ranks[-1] < ranks[0] < 32
    if steps % EVERY == 0:
        values = torch.linalg.svdvals(trp.model.get_parameter("head.0.weight").detach())
        assert int((values > 1e-5 * values[0]).sum()) == ranks[-1]


def finalizes(small: nn.Module, model: nn.Module) -> None:
    """Raise unless `small` computes the same as `model`, with fewer parameters."""
    x = Data().x
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())


def scalars(folder: Path) -> dict[str, list[float]]:
    """The values of every tag in the TensorBoard event files under a folder."""
    found: dict[str, list[float]] = {}
    for directory in {file.parent for file in folder.rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(directory))
        events.Reload()
        found |= {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return found


def good_metrics(logged: dict[str, list[float]], history: list[tuple[int, dict[str, int]]]) -> None:
    """Raise unless shares, overhead and ranks were logged, the latter as `history` has them, one for each projection."""
    assert logged["rankprune/rank/head.0"] == [ranks["head.0"] for _, ranks in history if "head.0" in ranks]
    assert 0 < logged["rankprune/macs"][-1] < logged["rankprune/macs"][0] < 1
    assert 0 < logged["rankprune/params"][-1] < logged["rankprune/params"][0] < 1
    assert all(0 < value < 100 for value in logged["rankprune/overhead"])
