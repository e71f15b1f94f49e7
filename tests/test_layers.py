import contextlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import rankprune as rp
from rankprune.projection import project

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]


class Net(nn.Module):
    """A plain linear layer, the module under test, and a last linear layer."""

    def __init__(self, odd: nn.Module, runs: bool = True) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.odd = odd
        self.last = nn.Linear(16, 4)
        self.runs = runs

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x)
        return self.last(self.odd(x) if self.runs else x)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Marked(Tensor):
    """A tensor of a type of its own, as quantized and semi-structured ones are."""


class OnFields(nn.Module):
    """Sees the 16 features as a picture of 4 channels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.view(-1, 4, 2, 2)).flatten(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x[:, None], x[:, None], x[:, None])[0][:, 0]


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x > 0).sum(-1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Own(nn.Module):
    """A layer type that nobody knows, perhaps with its matrix under two names."""

    def __init__(self, aliased: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        if aliased:
            self.alias = self.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class TiedByMemory(Tied):
    """As it is where one parameter is made from another."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight = nn.Parameter(self.a.weight.detach())


class TiedByAPart(Tied):
    """The second half of one weight is the first of the other."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.randn(24, 16)
        self.a.weight, self.b.weight = nn.Parameter(both[:16]), nn.Parameter(both[8:])


class TiedBias(nn.Module):
    """A linear layer whose bias is a scale's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(16, 16), nn.LayerNorm(16)
        self.scale.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.a(x))


def changed(change: Callable[[nn.Linear], object]) -> nn.Linear:
    layer = nn.Linear(16, 16)
    change(layer)
    return layer


def with_weight(dtype: torch.dtype) -> nn.Linear:
    def change(layer: nn.Linear) -> None:
        layer.weight = nn.Parameter(torch.ones(16, 16).to(dtype), requires_grad=False)

    return changed(change)


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(16, 16)))


def convolution(**set_later: object) -> nn.Module:
    layer = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect" if "padding" in set_later else "zeros")
    for name, value in set_later.items():
        setattr(layer, name, value)
    return OnFields(layer)


def replaced_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: x + 1


def scaled(layer: nn.Linear) -> None:
    layer.scale = nn.Parameter(torch.ones(16))


def bias_as_buffer(layer: nn.Linear, plain: bool = False) -> None:
    bias = layer.bias.detach()
    del layer.bias
    if plain:
        layer.__dict__["bias"] = bias
    else:
        layer.register_buffer("bias", bias)


PARAMETRIZATION = "odd.parametrizations.weight"
RUNNING = {
    "quantized": (quantized, "odd.0", "not supported"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(16, 16)), "odd", "parametrized"),
    "a parametrization": (lambda: parametrizations.orthogonal(nn.Linear(16, 16)), PARAMETRIZATION, "not supported"),
    "weight_norm": (lambda: weight_norm(nn.Linear(16, 16)), "odd", "weight_norm"),
    "spectral_norm": (lambda: spectral_norm(nn.Linear(16, 16)), "odd", "spectral_norm"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5), "odd", "pruning"),
    "tied, first": (Tied, "odd.a", "shared with 'odd.b'"),
    "tied, second": (Tied, "odd.b", "shared with 'odd.a'"),
    "tied by memory": (TiedByMemory, "odd.b", "its weight is shared with 'odd.a'"),
    "tied by a part": (TiedByAPart, "odd.b", "its weight is shared with 'odd.a'"),
    "tied bias": (TiedBias, "odd.a", "its bias is shared with 'odd.scale'"),
    "subclass": (lambda: Doubled(16, 16), "odd", "Doubled is a subclass of Linear"),
    "conv subclass": (lambda: OnFields(DoubledConv(4, 4, 1)), "odd.inner", "DoubledConv is a subclass of Conv2d"),
    "attention": (Attention, "odd.mix", "MultiheadAttention layers are not supported"),
    "attention's output": (Attention, "odd.mix.out_proj", "subclass of Linear"),
    "embedding": (Lookup, "odd.table", "Embedding layers are not supported"),
    "LSTM": (Recurrent, "odd.cell", "LSTM layers are not supported"),
    "own": (Own, "odd", "Own layers are not supported"),
    "own, aliased": (lambda: Own(aliased=True), "odd", "Own layers are not supported"),
    "hook": (lambda: changed(lambda m: m.register_forward_hook(lambda *a: a[-1] + 1)), "odd", "hooks"),
    "pre-hook": (lambda: changed(lambda m: m.register_forward_pre_hook(lambda *a: None)), "odd", "hooks"),
    "backward hook": (lambda: changed(lambda m: m.register_full_backward_hook(lambda *a: None)), "odd", "hooks"),
    "forward": (lambda: changed(replaced_forward), "odd", "forward has been replaced"),
    "a stride of one number": (lambda: convolution(stride=1), "odd.inner", "its stride is 1, not 2 numbers"),
    "a dilation of one number": (lambda: convolution(dilation=1), "odd.inner", "its dilation is 1, not 2 numbers"),
    "a padding set later": (lambda: convolution(padding=(0, 0)), "odd.inner", "'reflect' ignores"),
    "a padding set later, in words": (lambda: convolution(padding="valid"), "odd.inner", "'reflect' ignores"),
    "a padding of no name": (lambda: convolution(padding="full"), "odd.inner", "its padding is 'full'"),
    "a bias that is a buffer": (lambda: changed(bias_as_buffer), "odd", "it holds bias,"),
    "a bias that is a plain tensor": (lambda: changed(partial(bias_as_buffer, plain=True)), "odd", "it holds bias,"),
    "a parameter more": (lambda: changed(scaled), "odd", "it holds scale,"),
    "a buffer more": (lambda: changed(lambda m: m.register_buffer("seen", torch.ones(16))), "odd", "it holds seen,"),
    "a module inside": (lambda: changed(lambda m: m.add_module("act", nn.PReLU())), "odd", "it holds act,"),
    "first convolution": (lambda: OnFields(nn.Conv2d(4, 4, 3, padding=1)), "odd.inner", "first convolution"),
    "last linear": (nn.Identity, "last", "last Linear"),
}
IDLE = {
    "meta": (lambda: nn.Linear(16, 16, device="meta"), "odd", "meta device"),
    "integer": (lambda: with_weight(torch.int8), "odd", "dtype torch.int8"),
    "complex": (lambda: with_weight(torch.complex64), "odd", "dtype torch.complex64"),
    "float8": (lambda: with_weight(torch.float8_e4m3fn), "odd", "dtype torch.float8_e4m3fn"),
    "empty": (lambda: nn.Linear(0, 16), "odd", "empty"),
    "lazy linear": (lambda: nn.LazyLinear(16), "odd", "run one forward pass"),
    "lazy convolution": (lambda: nn.LazyConv2d(4, 3), "odd", "run one forward pass"),
    "lazy transposed": (lambda: nn.LazyConvTranspose1d(4, 3), "odd", "run one forward pass"),
}


def assert_left_alone(model: Net, name: str, reason: str, example_inputs: Tensor | None) -> None:
    """`name` is skipped with this reason, nothing crashes, and only the plain layer becomes a pair, of rank 2."""
    plan = rp.make_plan(model, example_inputs, rule=rp.FixedRank(2))
    assert reason in plan.skipped[name]
    assert plan.skipped[name] in str(plan)
    assert plan.ranks == {"plain": 2}
    project(model, plan)  # so that the plain layer computes what its pair will
    small = rp.decompose(model, plan)
    assert type(small.plain) is nn.Sequential
    assert type(small.get_submodule(name)) is type(model.get_submodule(name))
    x = torch.randn(8, 16)
    with torch.no_grad():
        assert torch.allclose(small.eval()(x), model.eval()(x), atol=1e-5)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("case", [*RUNNING, *IDLE])
def test_what_cannot_be_decomposed_is_skipped_with_a_reason(case: str, counted: bool) -> None:
    make, name, reason = (RUNNING | IDLE)[case]
    assert_left_alone(Net(make(), runs=case in RUNNING), name, reason, torch.randn(8, 16) if counted else None)


def test_weights_that_are_no_plain_tensors_are_skipped_with_a_reason() -> None:
    sparse, marked, cut = nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(8, 8, 3)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse())
    marked.weight = nn.Parameter(marked.weight.detach().as_subclass(Marked))
    cut.weight.data = cut.weight.data[:4]  # pruned by hand: out_channels says 8
    model = nn.ModuleList([nn.Conv2d(3, 8, 3), sparse, marked, cut, nn.Linear(8, 8), nn.Linear(8, 4)])
    plan = rp.make_plan(model, rule=rp.FixedRank(2))
    assert plan.skipped["1"] == "its weight is of layout torch.sparse_coo"
    assert plan.skipped["2"] == "its weight is a Marked, no plain tensor"
    assert plan.skipped["3"] == "its weight of shape (4, 8, 3, 3) is not what its other attributes say: (8, 8, 3, 3)"
    assert plan.ranks == {"4": 2}


def test_a_padding_that_does_not_go_with_the_stride_is_a_reason() -> None:
    strided = nn.Conv2d(8, 8, 3, stride=2)
    strided.padding = "same"
    plan = rp.make_plan(nn.ModuleList([nn.Conv2d(3, 8, 3), strided, nn.Linear(8, 8), nn.Linear(8, 4)]), rule=rp.FixedRank(2))
    assert plan.skipped["1"] == "its padding is 'same', which does not go with a stride"
    assert plan.ranks == {"2": 2}


def test_a_layer_that_does_not_run_is_skipped_where_example_inputs_tell() -> None:
    model = Net(nn.Linear(16, 16), runs=False)
    assert_left_alone(model, "odd", "does not run", torch.randn(8, 16))
    assert rp.make_plan(model, rule=rp.FixedRank(2)).ranks == {"plain": 2, "odd": 2}


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)])
def test_a_model_in_training_with_computed_weights_can_be_decomposed(wrap) -> None:
    model = Net(wrap(nn.Linear(16, 16)))
    model(torch.randn(8, 16)).sum().backward()
    assert_left_alone(model, "odd", "computed from other parameters", None)


def test_planning_leaves_a_lazy_layer_lazy() -> None:
    model = Net(nn.LazyLinear(16))
    with contextlib.suppress(rp.RankPruneError):
        rp.make_plan(model, torch.randn(8, 16), rule=rp.FixedRank(2))
    assert isinstance(model.odd, nn.LazyLinear)


# -- layers that run, but whose owner needs more of them than a Sequential gives --------------------------------------


class Upsampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.mid = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.mid(self.down(x)), output_size=x.shape[-2:])


def test_a_transposed_convolution_called_with_an_output_size_still_runs() -> None:
    model, x = Upsampler(), torch.randn(1, 4, 8, 8)
    plan = rp.make_plan(model, x, rule=rp.FixedRank(2))
    project(model, plan)
    with torch.no_grad():
        assert torch.allclose(rp.decompose(model, plan)(x), model(x), atol=1e-5)


class Reading(nn.Module):
    """Uses a layer, and reads `attribute` of it as transformers' T5 reads wo.weight.dtype and its Whisper conv2.stride."""

    def __init__(self, attribute: str, when: bool = True) -> None:
        super().__init__()
        self.plain, self.read, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.read.scale = 2.0
        self.attribute, self.when = attribute, when

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(self.plain(x))
        if self.when:
            getattr(self.read, self.attribute)
        return self.last(y)


@pytest.mark.parametrize("attribute", ["weight", "bias", "in_features", "scale"])
def test_a_layer_of_which_other_code_reads_what_a_pair_lacks_stays(attribute: str) -> None:
    model, x = Reading(attribute), torch.randn(8, 16)
    plan = rp.make_plan(model, x, rule=rp.FixedRank(2))
    assert plan.ranks == {"plain": 2}
    assert f"other code reads its {attribute!r}" in plan.skipped["read"]
    rp.decompose(model, plan)(x)
    assert {type(m) for m in (model.plain, model.read, model.last)} == {nn.Linear}


@pytest.mark.parametrize(("attribute", "when"), [("training", True), ("parameters", True), ("weight", False)])
def test_what_a_pair_has_may_be_read(attribute: str, when: bool) -> None:
    plan = rp.make_plan(Reading(attribute, when), torch.randn(8, 16), rule=rp.FixedRank(2))
    assert plan.ranks == {"plain": 2, "read": 2}


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.a(x)))


def test_a_module_under_two_names_is_decomposed_once() -> None:
    model, x = TwoNames(), torch.randn(2, 16)
    plan = rp.make_plan(model, x, rule=rp.FixedRank(2))
    assert plan.ranks == {"a": 2}
    assert plan.decomposed["a"].macs_before == 2 * 2 * 16 * 16
    project(model, plan)
    small = rp.decompose(model, plan)
    assert small.a is small.b
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=1e-5)
