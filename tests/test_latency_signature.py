"""Which networks a latency is taken to be of."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankprune.latency.signature import described, numerics_on


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


class Sequenced(nn.Linear):
    def forward(self, data: Tensor, *_: object) -> Tensor:
        return super().forward(data)


class Kind(Enum):
    ONE, OTHER = 1, 2


@dataclass
class Options:
    causal: bool
    within: object = None


def test_attributes_and_inputs_that_decide_on_a_time() -> None:
    def of(value: object) -> nn.Module:
        net = nn.Sequential(nn.Linear(32, 32))
        net.value = value
        return net

    x = torch.randn(2, 32)
    circular = Options(True)
    circular.within = circular
    values = (torch.bfloat16, torch.float16), (Kind.ONE, Kind.OTHER), (Options(True), Options(False)), (circular, Options(True))
    for one, other in values:
        assert described(of(one), x) == described(of(one), x) != described(of(other), x)

    class Choosing(nn.Linear):
        def forward(self, x: Tensor, *_: object) -> Tensor:
            return super().forward(x)

    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 32)])
    assert described(Sequenced(32, 32), packed) == described(Sequenced(32, 32), packed)
    net, image = Choosing(32, 32), torch.randn(2, 3, 4, 32)
    forms = [(x, "fast"), (x, "full"), (x,), (image,), (image.to(memory_format=torch.channels_last),)]
    assert len({described(net, form) for form in forms}) == len(forms)
    assert described(net, x) != described(net.double(), x.double())


def test_inputs_of_other_names_or_places_are_told_apart() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            y = super().forward(x)
            y = y if mask is None else y * mask
            return y if bias is None else y + bias

    model, x = Masked(4, 4), torch.randn(2, 4)
    inputs = [{"x": x, "mask": x}, {"x": x, "bias": x}, (x, x, None), (x, None, x)]
    assert len({described(model, each) for each in inputs}) == 4


def test_convolutions_that_are_narrowed_by_themselves() -> None:
    conv = getattr(torch.backends.mkldnn, "conv", None)
    if not hasattr(conv, "fp32_precision"):
        pytest.skip("this torch has no such setting")
    before, text = conv.fp32_precision, numerics_on("cpu")
    conv.fp32_precision = "bf16"
    try:
        assert numerics_on("cpu") != text
    finally:
        conv.fp32_precision = before


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
