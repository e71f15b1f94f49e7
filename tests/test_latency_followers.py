"""Which modules and functions take up a layer's output, and are timed with it."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from own_clock import network
from rankprune.latency.followers import followers


def test_followers_are_the_modules_that_take_up_the_output() -> None:
    model, x = network()
    layers = {name: model.get_submodule(name) for name in ("1", "2", "5", "7")}
    tails = {name: [type(m) for m in tail] for name, tail in followers(model, x, layers).items()}
    assert tails == {"1": [], "2": [nn.BatchNorm2d, nn.ReLU], "5": [nn.ReLU], "7": []}


def test_followers_in_what_is_compiled() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.layer(x)))

    model, x = Block().eval(), torch.randn(2, 3, 8, 8)
    model.compile(backend="eager")
    with torch.no_grad():
        model(x)
    assert [type(m) for m in followers(model, x, {"layer": model.layer})["layer"]] == [nn.BatchNorm2d, nn.ReLU]


def test_followers_end_where_two_modules_take_up_one_tensor() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.left, self.right, self.norm, self.relu = *(nn.BatchNorm2d(4) for _ in range(3)), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            z = self.norm(self.after(self.relu(self.left(y)) + self.right(y)))
            return torch.relu(z) + self.relu(z.clone()) + nn.functional.silu(self.relu(z))

    model = Forked()
    layers = {"layer": model.layer, "after": model.after}
    tails = {n: [type(m) for m in t] for n, t in followers(model, torch.randn(2, 3, 4, 4), layers).items()}
    assert tails == {"layer": [], "after": [nn.BatchNorm2d]}


@pytest.mark.parametrize(
    ("activation", "found"),
    [
        (nn.ReLU(inplace=True), nn.ReLU(inplace=True)),
        (nn.GELU("tanh"), nn.GELU("tanh")),
        (nn.LeakyReLU(0.3), nn.LeakyReLU(0.3)),
        (nn.ReLU6(), nn.Hardtanh(0.0, 6.0)),
        (nn.SiLU(), nn.SiLU()),
        (nn.Hardswish(), nn.Hardswish()),
        (nn.Hardsigmoid(), nn.Hardsigmoid()),
        (F.relu, nn.ReLU()),
        (torch.relu_, nn.ReLU()),
        (Tensor.relu, nn.ReLU()),
        (F.silu, nn.SiLU()),
        (partial(F.gelu, approximate="tanh"), nn.GELU("tanh")),
    ],
    ids=[
        "ReLU",
        "GELU",
        "LeakyReLU",
        "ReLU6",
        "SiLU",
        "Hardswish",
        "Hardsigmoid",
        "relu",
        "relu_",
        "Tensor.relu",
        "silu",
        "gelu",
    ],
)
def test_followers_are_functions_as_well(activation: Callable[[Tensor], Tensor], found: nn.Module) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return activation(self.norm(self.layer(x))) + 1

    model = Functional()
    norm, last = followers(model, torch.randn(2, 3, 4, 4), {"layer": model.layer})["layer"]
    assert type(norm) is nn.BatchNorm2d
    assert not norm._forward_hooks
    x = 9 * torch.randn(9)
    assert type(last) is type(found)
    assert torch.equal(last(x.clone()), found(x.clone()))


def test_followers_of_a_layer_used_twice_are_those_of_its_first_call() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.first, self.second = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.unused = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.second(self.layer(self.first(self.layer(x)))))

    model = Shared()
    nn.init.constant_(model.first.weight, 7.0)
    found = followers(model, torch.randn(2, 4, 4, 4), {"layer": model.layer, "unused": model.unused})
    assert [type(m) for m in found["layer"]] == [nn.BatchNorm2d]
    assert found["layer"][0].weight[0] == 7
    assert found["unused"] == []
