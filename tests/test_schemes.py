import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from by_hand import as_matrices, as_weight
from rankprune.cost import count
from rankprune.errors import RankPruneError
from rankprune.schemes import CHOICES, SCHEMES, Scheme, schemes_for

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

CONV_SCHEMES = [name for name in SCHEMES if name != "linear"]
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
KERNELS = {
    1: [(1,), (3,), (5,), (7,), (2,), (4,)],
    2: [(1, 1), (3, 3), (5, 5), (3, 1), (1, 7), (2, 2), (4, 3)],
    3: [(1, 1, 1), (3, 3, 3), (3, 1, 2), (1, 2, 3), (2, 2, 2)],
}
RELATIVE_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def svd_factors(matrices: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Truncated factors (stack, rows, r) and (stack, r, columns), from PyTorch's own float64 SVD."""
    u, s, vh = torch.linalg.svd(matrices.detach().double(), full_matrices=False)
    return (u * s[:, None])[..., :rank], vh[:, :rank]


def full_pair(scheme: Scheme, layer: nn.Module) -> nn.Sequential:
    return scheme.pair(layer, *svd_factors(scheme.to_matrices(layer, layer.weight)))


def assert_same_output(pair: nn.Module, layer: nn.Module, x: Tensor, tolerance: float | None = None) -> None:
    with torch.no_grad():
        ours, dense = pair(x), layer(x)
    assert ours.shape == dense.shape
    assert ours.dtype == dense.dtype
    bound = RELATIVE_ERROR[dense.dtype] if tolerance is None else tolerance
    assert (ours.double() - dense.double()).norm() <= bound * dense.double().norm()


@st.composite
def convolutions(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = tuple(RELATIVE_ERROR)) -> tuple[nn.Module, Tensor]:
    """Any stock convolution, and an input that it takes."""
    d, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    kernel = draw(st.sampled_from(KERNELS[d]))
    per_axis = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * d))  # noqa: E731
    stride, dilation, padding = per_axis(1, 3), per_axis(1, 2), per_axis(0, 2)
    groups, c, n = draw(st.sampled_from([(1, 4, 6), (1, 1, 3), (2, 4, 6), (3, 6, 3), (4, 4, 4), (3, 3, 6)]))
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "padding": padding}
    if transposed:
        options["output_padding"] = tuple(draw(st.integers(0, max(s, e) - 1)) for s, e in zip(stride, dilation, strict=True))
    else:
        form = draw(st.sampled_from(["int", "per axis", "same", "valid"]))
        if form == "same":
            options.update(padding="same", stride=1)
        elif form != "per axis":
            options["padding"] = {"int": padding[0], "valid": "valid"}[form]
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    dtype, bias = draw(st.sampled_from(dtypes)), draw(st.booleans())
    layer = (TRANSPOSED if transposed else CONVS)[d](c, n, kernel, groups=groups, bias=bias, dtype=dtype, **options)
    extent = [max(e * (k - 1) + 1, 5) + draw(st.integers(0, 2)) for k, e in zip(kernel, dilation, strict=True)]
    return layer, torch.randn(2, c, *extent, dtype=dtype)


@pytest.mark.parametrize("name", CONV_SCHEMES)
@settings(max_examples=250)
@given(case=convolutions())
def test_at_full_rank_the_pair_equals_the_convolution(name: str, case: tuple[nn.Module, Tensor]) -> None:
    (layer, x), scheme = case, SCHEMES[name]
    if reason := scheme.unsupported(layer):
        assert name == "decoupled"
        assert math.prod(layer.kernel_size) == 1
        assert "pointwise" in reason
        return
    pair = full_pair(scheme, layer)
    assert type(pair) is nn.Sequential
    assert {type(half) for half in pair} <= {*CONVS.values(), *TRANSPOSED.values()}
    assert_same_output(pair, layer, x)


@pytest.mark.parametrize("name", CONV_SCHEMES)
@settings(max_examples=60)
@given(case=convolutions(dtypes=(torch.float32,)))
def test_to_weight_inverts_to_matrices(name: str, case: tuple[nn.Module, Tensor]) -> None:
    layer, scheme = case[0], SCHEMES[name]
    matrices = scheme.to_matrices(layer, layer.weight.detach())
    assert matrices.dim() == 3
    assert torch.equal(scheme.to_weight(layer, matrices), layer.weight)


@pytest.mark.parametrize("dtype", RELATIVE_ERROR)
@pytest.mark.parametrize("leading", [(), (5,), (0,), (2, 3), (2, 1, 2, 3)])
@pytest.mark.parametrize(("c", "n", "bias"), [(6, 4, True), (4, 9, False), (5, 1, True)])
def test_at_full_rank_the_pair_equals_the_linear_layer(c, n, bias, leading, dtype) -> None:
    layer, scheme = nn.Linear(c, n, bias=bias, dtype=dtype), SCHEMES["linear"]
    matrices = scheme.to_matrices(layer, layer.weight.detach())
    assert torch.equal(scheme.to_weight(layer, matrices), layer.weight)
    pair = full_pair(scheme, layer)
    assert [type(half) for half in pair] == [nn.Linear, nn.Linear]
    assert_same_output(pair, layer, torch.randn(*leading, c, dtype=dtype))


@pytest.mark.parametrize("name", CONV_SCHEMES)
def test_the_pair_takes_an_input_without_a_batch_axis(name: str) -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1)
    assert_same_output(full_pair(SCHEMES[name], layer), layer, torch.randn(4, 7, 7))


# -- reduced rank, against the matrices as the papers define them ---------------------------------------------------


def reference_projection(weight: Tensor, name: str, rank: int) -> Tensor:
    """The weight of a Linear layer, or (n, c, k1, k2) of one group, projected on rank `rank` of the scheme."""
    left, right = svd_factors(as_matrices(weight, name), rank)
    return as_weight(left @ right, weight, name)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", CONV_SCHEMES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(4, 6, 3, padding=1),
        lambda: nn.Conv2d(6, 9, (3, 2), stride=(2, 1), groups=3, padding=(1, 2), padding_mode="circular"),
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=2, padding=1, output_padding=1),
        lambda: nn.ConvTranspose2d(6, 8, 3, stride=(1, 2), groups=2, dilation=2, bias=False),
    ],
    ids=["plain", "grouped", "transposed", "transposed and grouped"],
)
def test_at_a_lower_rank_the_pair_equals_the_layer_with_a_projected_weight(make, name, rank) -> None:
    layer, scheme = make().double(), SCHEMES[name]
    pair = scheme.pair(layer, *svd_factors(scheme.to_matrices(layer, layer.weight), rank))
    with torch.no_grad():
        for group in layer.weight.chunk(layer.groups):  # each (n/g, c/g, ...), transposed ones (c/g, n/g, ...)
            as_conv = group.transpose(0, 1) if layer.transposed else group
            low = reference_projection(as_conv, name, rank)
            group.copy_(low.transpose(0, 1) if layer.transposed else low)
    assert_same_output(pair, layer, torch.randn(2, layer.in_channels, 7, 6, dtype=torch.float64))


def test_at_a_lower_rank_a_linear_pair_equals_the_layer_with_a_projected_weight() -> None:
    layer, scheme = nn.Linear(7, 5).double(), SCHEMES["linear"]
    pair = scheme.pair(layer, *svd_factors(scheme.to_matrices(layer, layer.weight), 2))
    with torch.no_grad():
        layer.weight.copy_(reference_projection(layer.weight, "linear", 2))
    assert_same_output(pair, layer, torch.randn(3, 7, dtype=torch.float64))


# -- cost -----------------------------------------------------------------------------------------------------------

PARAMS_PER_RANK = {"channel": 16 * 9 + 16, "spatial": 16 * 3 + 3 * 16, "decoupled": 16 * (16 + 9), "linear": 16 + 16}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_cost_is_proportional_to_the_rank(name: str, rank: int) -> None:
    layer = nn.Linear(16, 16) if name == "linear" else nn.Conv2d(16, 16, 3, padding=1)
    x = torch.zeros(1, 16) if name == "linear" else torch.zeros(1, 16, 4, 4)
    cost = count(SCHEMES[name].empty_pair(layer, rank), x)
    assert cost.params == rank * PARAMS_PER_RANK[name] + 16  # the bias
    assert cost.macs == rank * PARAMS_PER_RANK[name] * (1 if name == "linear" else 4 * 4)


def test_a_strided_spatial_pair_strides_one_axis_in_each_half() -> None:
    layer = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
    first, second = SCHEMES["spatial"].empty_pair(layer, 2)
    assert (first.stride, second.stride) == ((2, 1), (1, 2))
    cost = count(nn.Sequential(first, second), torch.zeros(1, 8, 8, 8))
    assert cost.macs == 2 * 8 * 3 * (4 * 8) + 2 * 8 * 3 * (4 * 4)


# -- what the pair takes over ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONV_SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_pair_keeps_bias_dtype_and_mode(name: str, bias: bool, training: bool) -> None:
    layer = nn.Conv2d(4, 6, 3, bias=bias, dtype=torch.bfloat16).train(training)
    pair = full_pair(SCHEMES[name], layer)
    assert pair[0].bias is None
    assert torch.equal(pair[1].bias, layer.bias) if bias else pair[1].bias is None
    assert {p.dtype for p in pair.parameters()} == {torch.bfloat16}
    assert {m.training for m in pair.modules()} == {training}


@pytest.mark.parametrize("name", CONV_SCHEMES)
@pytest.mark.parametrize(("weight_grad", "bias_grad"), [(True, False), (False, True), (False, False)])
def test_the_pair_keeps_requires_grad(name: str, weight_grad: bool, bias_grad: bool) -> None:
    layer = nn.Conv2d(4, 6, 3)
    layer.weight.requires_grad_(weight_grad)
    layer.bias.requires_grad_(bias_grad)
    first, second = full_pair(SCHEMES[name], layer)
    assert first.weight.requires_grad == second.weight.requires_grad == weight_grad
    assert second.bias.requires_grad == bias_grad
    assert all(p.is_leaf for p in (first.weight, second.weight, second.bias))


@pytest.mark.parametrize("name", CONV_SCHEMES)
def test_the_pair_keeps_channels_last(name: str) -> None:
    layer = nn.Conv2d(4, 6, 3)
    is_last = lambda pair: all(p.weight.is_contiguous(memory_format=torch.channels_last) for p in pair)  # noqa: E731
    assert not is_last(full_pair(SCHEMES[name], layer))
    pair = full_pair(SCHEMES[name], layer.to(memory_format=torch.channels_last))
    assert is_last(pair)
    assert_same_output(pair, layer, torch.randn(2, 4, 7, 7).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("name", CONV_SCHEMES)
def test_the_layer_is_left_as_it_was(name: str) -> None:
    layer = nn.Conv2d(4, 6, 3)
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        for p in full_pair(SCHEMES[name], layer).parameters():
            p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


# -- the choice of schemes ------------------------------------------------------------------------------------------


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_auto_means_every_scheme_that_can_express_the_layer() -> None:
    names = lambda layer: [s.name for s in schemes_for("auto", layer)[0]]  # noqa: E731
    assert names(nn.Conv2d(4, 4, 3)) == list(CONV_SCHEMES)
    assert names(nn.ConvTranspose3d(4, 4, 1, stride=2)) == ["channel", "spatial"]
    assert names(nn.ConvTranspose2d(4, 4, 1, dilation=3, output_padding=(0, 1))) == ["channel", "spatial"]
    assert names(nn.Conv2d(4, 4, 1, padding=1)) == ["channel", "spatial"], "whose pair pads along one axis first"
    assert names(nn.Linear(4, 4)) == ["linear"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(6, 4, 3),
        nn.Conv2d(6, 4, 1, stride=2),
        nn.Conv2d(6, 4, (3, 1), groups=2),
        nn.ConvTranspose1d(6, 4, 3, stride=2),
        nn.Conv2d(6, 4, (3, 1), padding="same", dilation=2),
        nn.Conv2d(6, 4, (3, 1), padding=(1, 0)),
        nn.ConvTranspose3d(6, 4, 1, padding=1),
    ],
    ids=str,
)
def test_auto_leaves_out_what_repeats_another_scheme(layer: nn.Module) -> None:
    channel, spatial = SCHEMES["channel"], SCHEMES["spatial"]
    assert schemes_for("auto", layer)[0] == tuple(s for s in SCHEMES.values() if s is not spatial and not s.unsupported(layer))
    assert schemes_for("spatial", layer)[0] == (spatial,)
    values = [torch.linalg.svdvals(s.to_matrices(layer, layer.weight)) for s in (channel, spatial)]
    torch.testing.assert_close(*values)
    x = torch.zeros(1, 6, *[8] * len(layer.kernel_size))
    costs = [count(s.empty_pair(layer, 2), x) for s in (channel, spatial)]
    assert costs[0].params == costs[1].params
    assert costs[0].macs <= costs[1].macs


def test_the_conv1d_of_transformers_is_a_linear_layer() -> None:
    layer, x = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4), torch.randn(2, 3, 4)
    (scheme,), _ = schemes_for("auto", layer)
    nn.init.normal_(layer.bias)
    matrices = scheme.to_matrices(layer, layer.weight)
    assert (scheme.name, matrices.shape) == ("linear", (1, 6, 4))
    assert torch.equal(scheme.to_weight(layer, matrices), layer.weight)
    assert_same_output(full_pair(scheme, layer), layer, x)
    torch.testing.assert_close(scheme.input_patches(layer, x) @ matrices.mT + layer.bias, layer(x).flatten(0, 1)[None])


@pytest.mark.parametrize("name", [*CONV_SCHEMES, "auto"])
def test_linear_layers_always_use_the_linear_scheme(name: str) -> None:
    assert [s.name for s in schemes_for(name, nn.Linear(4, 4))[0]] == ["linear"]


@pytest.mark.parametrize("layer", [Scaled(4, 4, 3), nn.BatchNorm2d(4), nn.LazyConv2d(4, 3)])
def test_other_types_are_refused_with_a_reason(layer: nn.Module) -> None:
    fitting, reason = schemes_for("auto", layer)
    assert fitting == ()
    assert type(layer).__name__ in reason
    assert all(s.unsupported(layer) for s in SCHEMES.values())


def test_a_parametrized_layer_is_refused() -> None:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert schemes_for("auto", layer)[0] == ()


@pytest.mark.parametrize("name", ["channels", "linear", ""])
def test_an_unknown_scheme_is_named(name: str) -> None:
    with pytest.raises(RankPruneError, match=f"'{name}'.*{', '.join(CHOICES)}"):
        schemes_for(name, nn.Conv2d(4, 4, 3))
