"""Which networks a latency is taken to be of."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankprune.latency.signature import described


class Configured(nn.Sequential):
    """Keeps how it computes in a configuration, like the models of transformers."""

    class Config:
        def __init__(self, attention: str) -> None:
            self._attn_implementation = attention

        def to_json_string(self) -> str:
            return '{"width": 32}'

    def __init__(self, attention: str) -> None:
        super().__init__(nn.Linear(32, 32))
        self.config = self.Config(attention)


def test_networks_that_look_alike_are_other_networks() -> None:
    x = torch.randn(2, 4, 32)
    one, two = (nn.TransformerEncoderLayer(32, heads, 64, batch_first=True).eval() for heads in (1, 4))
    assert str(one) == str(two)
    wrapped, plain = nn.Sequential(nn.Linear(32, 32)), nn.Sequential(nn.Linear(32, 32))
    forward = wrapped.forward
    wrapped.forward = lambda x: forward(x)
    eager, fused = Configured("eager"), Configured("sdpa")
    for a, b in ((one, two), (wrapped, plain), (eager, fused)):
        assert described(a, x) == described(a, x) != described(b, x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = described(plain, x)
    assert narrow != described(plain, x)


def test_networks_that_differ_in_the_code_of_their_forward_only_are_told_apart() -> None:
    def kind(forward: Any) -> type[nn.Module]:
        return type("Net", (nn.Sequential,), {"forward": forward})

    def once(self: nn.Sequential, x: Tensor) -> Tensor:
        return self[0](x)

    def sorted_first(self: nn.Sequential, x: Tensor) -> Tensor:
        return self[0](x.sort().values)

    x = torch.randn(2, 8)
    first, again, other = (kind(forward)(nn.Linear(8, 8)) for forward in (once, once, sorted_first))
    assert described(first, x) == described(again, x) != described(other, x)


class Activated(nn.Module):
    """Keeps functions as attributes."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(8, 8), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))

    def doubled(self, x: Tensor) -> Tensor:
        return 2 * x


def with_method() -> Activated:
    model = Activated(torch.relu)
    model.activation = model.doubled
    return model


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: Activated(F.silu), lambda: Activated(F.relu)),
        (lambda: Activated(torch.relu), lambda: Activated(torch.tanh)),
        (lambda: Activated(functools.partial(F.gelu)), lambda: Activated(functools.partial(F.gelu, approximate="tanh"))),
        (with_method, lambda: Activated(torch.relu)),
    ],
    ids=["functions", "of C", "partial", "method"],
)
def test_functions_that_a_module_holds_are_told_apart(one: Callable[[], nn.Module], other: Callable[[], nn.Module]) -> None:
    x = torch.randn(2, 8)
    assert described(one(), x) == described(one(), x) != described(other(), x)


def test_what_a_decorator_wraps_is_told_apart() -> None:
    def decorated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(forward)
        def wrapper(*given: Any) -> Tensor:
            return forward(*given)

        return wrapper

    def kind(forward: Callable[..., Tensor]) -> type[nn.Module]:
        return type("Net", (nn.Sequential,), {"forward": decorated(forward)})

    x = torch.randn(2, 8)
    first, other = (kind(f)(nn.Linear(8, 8)) for f in (lambda self, x: self[0](x), lambda self, x: self[0](x.sort().values)))
    assert described(first, x) != described(other, x)
