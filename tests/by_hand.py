"""A network, and TRP on it as a training loop written out by hand."""

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankprune import schemes

SCHEMES = tuple(name for name in schemes.SCHEMES if name != "linear")
CONSIDERED = ("body", "hidden", "small")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = OrderedDict(
        first=nn.Conv2d(3, 8, 3, padding=1),
        norm=nn.BatchNorm2d(8),
        act=nn.ReLU(),
        body=nn.Conv2d(8, 16, 3, padding=1, bias=False),
        act2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        hidden=nn.Linear(16, 32),  # a tall matrix; the others are wide
        small=nn.Linear(32, 8),  # break-even rank 6.4
        act3=nn.ReLU(),
        head=nn.Linear(8, 5),
    )
    return nn.Sequential(layers)


def batches(steps: int, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randn(8, 3, 6, 6, generator=generator), torch.randint(5, (8,), generator=generator)


def sgd(model: nn.Module, **options: object) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **options})


def backward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x.to(model.head.weight.dtype)), y)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    for x, y in batches(steps, seed):
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()


def as_matrices(weight: Tensor, scheme: str) -> Tensor:
    if weight.dim() == 2:
        return weight[None]
    n, c, k1, k2 = weight.shape
    if scheme == "channel":
        return weight.reshape(1, n, c * k1 * k2)
    if scheme == "spatial":
        return weight.permute(1, 2, 0, 3).reshape(1, c * k1, n * k2)
    assert scheme == "decoupled"
    return weight.reshape(n, c, k1 * k2)


def as_weight(matrices: Tensor, weight: Tensor, scheme: str) -> Tensor:
    if weight.dim() == 4 and scheme == "spatial":
        n, c, k1, k2 = weight.shape
        return matrices.reshape(c, k1, n, k2).permute(2, 0, 1, 3)
    assert scheme in ("channel", "spatial", "decoupled", "linear"), scheme
    return matrices.reshape(weight.shape)


def truncate(weight: Tensor, scheme: str, keep: float) -> tuple[Tensor, Tensor, int | None]:
    """The truncated weight, its U V^T, and the rank; None as the rank of a layer whose pair would not pay."""
    u, s, vh = torch.linalg.svd(as_matrices(weight.detach(), scheme).double(), full_matrices=False)
    energy = s.square().sum(0)
    rank = next(r for r in range(1, len(energy) + 1) if energy[r:].sum() <= (1 - keep) * energy.sum())
    pays = rank * s.shape[0] * (u.shape[1] + vh.shape[2]) < weight.numel()
    low = (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]
    term = as_weight(u[..., :rank] @ vh[:, :rank], weight, scheme).to(weight)
    return as_weight(low, weight, scheme).to(weight), term, rank if pays else None


def reference(model: nn.Module, steps: int, *, every: int, keep: float, scheme: str, nuclear: float, cadence: str) -> list:
    optimizer = sgd(model)
    weights = {name: model.get_submodule(name).weight for name in CONSIDERED}
    first = cadence == "step" and nuclear
    terms = {name: truncate(weight, scheme, 1.0)[1] for name, weight in weights.items()} if first else {}
    history = []
    for step, (x, y) in enumerate(batches(steps), start=1):
        optimizer.zero_grad()
        backward(model, x, y)
        for name, term in terms.items():
            weights[name].grad += nuclear * term
        optimizer.step()
        if cadence == "projection":
            terms = {}
        if step % every == 0:
            ranks = {}
            for name, weight in weights.items():
                low, terms[name], ranks[name] = truncate(weight, scheme, keep)
                weight.data.copy_(low)
            history.append((step, {name: r for name, r in ranks.items() if r}))
    return history


def assert_same(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def exactly_same(a: nn.Module, b: nn.Module) -> None:
    assert_same(a, b, rtol=0, atol=0)
