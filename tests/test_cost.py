"""count against formulas worked out by hand, measure, and that neither disturbs the model."""

import contextlib
import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import rankprune as rp
from rankprune.cost import LayerCost, pair_macs
from rankprune.recipes.resnet import resnet

B, L, D = 2, 5, 16  # batch, tokens, width


def row(counted: rp.Count, name: str) -> LayerCost:
    return next(r for r in counted.layers if r.name == name)


def assert_adds_up(counted: rp.Count) -> None:
    assert counted.functional_macs >= 0
    assert sum(r.macs for r in counted.layers) + counted.functional_macs == counted.macs


def test_resnet20() -> None:
    counted = rp.count(resnet("resnet20"), torch.zeros(3, 3, 32, 32))
    first, same, halving = 3 * 16 * 9 * 32 * 32, 16 * 16 * 9 * 32 * 32, 16 * 32 * 9 * 16 * 16
    assert counted.macs == 3 * (first + 6 * same + 2 * (halving + 5 * same) + 64 * 10) == 3 * 40_551_040
    assert counted.params == 269_722  # 0.27 M in He et al. 2016, table 6
    assert row(counted, "layer2.0.conv1").macs == 3 * halving
    assert counted.functional_macs == 0
    assert counted.uncounted == ()
    assert_adds_up(counted)


KNOWN = [
    (nn.Linear(8, 4), (2, 3, 8), 2 * 3 * 8 * 4),
    (nn.Conv1d(4, 6, 5, stride=2), (2, 4, 11), 2 * 4 * 6 * 5 * 4),
    (nn.Conv2d(4, 6, (3, 5), padding=1), (2, 4, 8, 8), 2 * 4 * 6 * 15 * 8 * 6),
    (nn.Conv2d(8, 12, 3, groups=4, dilation=2), (1, 8, 9, 9), 2 * 12 * 9 * 5 * 5),
    (nn.Conv2d(8, 8, 3, groups=8, padding="same", padding_mode="circular"), (1, 8, 9, 9), 8 * 9 * 81),
    (nn.Conv3d(2, 3, 3), (1, 2, 5, 5, 5), 2 * 3 * 27 * 27),
    (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 2 * 4 * 6 * 9 * 25),
    (nn.ConvTranspose1d(4, 6, 3, groups=2), (1, 4, 7), 4 * 3 * 3 * 7),
]


@pytest.mark.parametrize(("layer", "shape", "macs"), KNOWN, ids=lambda v: type(v).__name__)
def test_one_layer(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    counted = rp.count(layer, torch.zeros(shape))
    assert counted.macs == macs
    assert counted.params == sum(p.numel() for p in layer.parameters())
    (only,) = counted.layers
    assert (only.name, only.kind, only.macs, only.input_shapes) == ("", type(layer).__name__, macs, (shape,))
    assert pair_macs(nn.Sequential(copy.deepcopy(layer)).to("meta"), (shape, shape)) == 2 * macs


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(B, L, 3, 4, D // 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


PROJECTIONS, PRODUCTS = 4 * B * L * D * D, 2 * B * L * L * D


def test_fused_attention() -> None:
    counted = rp.count(Attention(), torch.randn(B, L, D))
    assert row(counted, "qkv").macs == 3 * B * L * D * D
    assert counted.functional_macs == PRODUCTS
    assert_adds_up(counted)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights: bool) -> None:
    x = torch.randn(B, L, D)
    attention = nn.MultiheadAttention(D, 4, batch_first=True).eval()
    counted = rp.count(attention, {"query": x, "key": x, "value": x, "need_weights": need_weights})
    assert counted.macs == PROJECTIONS + PRODUCTS
    assert_adds_up(counted)


@pytest.mark.parametrize("wrapped", [False, True])
def test_transformer_encoder_has_no_fast_path(wrapped: bool) -> None:
    layer = nn.TransformerEncoderLayer(D, 4, dim_feedforward=32, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 2).eval() if wrapped else layer
    counted = rp.count(model, torch.randn(B, L, D))
    assert counted.macs == (1 + wrapped) * (PROJECTIONS + PRODUCTS + 2 * B * L * D * 32)
    assert counted.uncounted == ()
    assert_adds_up(counted)


@pytest.mark.parametrize("norm", [nn.LayerNorm((3, 4, 4)), nn.RMSNorm((3, 4, 4))])
def test_a_norm_over_several_axes_multiplies_no_matrices(norm: nn.Module) -> None:
    model = nn.Sequential(norm, nn.Conv2d(3, 4, 1))
    assert rp.count(model, torch.randn(2, 3, 4, 4)).uncounted == ()
    assert "0" not in rp.make_plan(model, rule=rp.FixedRank(1), include=["*"]).skipped


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_are_named_as_uncounted(kind: type, gates: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.recurrent, self.head = nn.Embedding(9, 8), kind(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.recurrent(self.table(x))[0])

    counted = rp.count(Net(), torch.zeros(4, 2, dtype=torch.long))
    if row(counted, "recurrent").macs == 0:
        assert counted.uncounted == ("recurrent",)
    else:
        assert row(counted, "recurrent").macs == 8 * gates * 2 * 8 * 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_layers_are_named_as_uncounted() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    quantized = torch.ao.quantization.quantize_dynamic(model, {"0": torch.ao.quantization.default_dynamic_qconfig})
    counted = rp.count(quantized, torch.randn(2, 8))
    assert counted.uncounted == ("0",)
    assert counted.macs == 2 * 8 * 4


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Conv2d(3, 3, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        y = self.layer(self.layer(x))
        return y if more is None else y + self.layer(more)


def test_module_called_more_than_once() -> None:
    x, more = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 6, 6)
    once, conv = 3 * 3 * 9, (1, 3)
    for inputs in ((x, more), [x, more], {"x": x, "more": more}):
        counted = rp.count(Twice(), inputs)
        assert counted.macs == row(counted, "layer").macs == once * (36 + 16 + 16)
        assert row(counted, "layer").input_shapes == ((*conv, 8, 8), (*conv, 6, 6), (*conv, 6, 6))
        assert (row(counted, "unused").macs, row(counted, "unused").calls) == (0, 0)
        assert counted.uncounted == ()
    assert rp.count(Twice(), (x,)).macs == once * (36 + 16)


def test_keyword_tensor_gives_the_input_shape() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    assert row(rp.count(Net(), torch.zeros(3, 4)), "layer").input_shapes == ((3, 4),)


class Stateful(nn.Module):
    """Draws random numbers and counts its calls, in eval mode as well."""

    def __init__(self, *, fails: bool = False, assigns: bool = False) -> None:
        super().__init__()
        self.norm, self.layer, self.drop = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(4))
        self.fails, self.assigns = fails, assigns

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.assigns:
            self.calls = self.calls + 1
        y = self.layer(self.drop(self.norm(x + torch.rand_like(x) + self.calls)))
        if self.fails:
            raise RuntimeError("stop")
        return y


BOTH = pytest.mark.parametrize("act", [rp.count, partial(rp.measure, runs=2)], ids=["count", "measure"])


@BOTH
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_disturbed(act: Callable, fails: bool) -> None:
    model, x = Stateful(fails=fails), torch.randn(3, 4)
    model.layer.eval()
    model.norm.requires_grad_(False)
    modes, wanting = [(type(m), m.training) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    error = rp.RankPruneError if act is rp.count else RuntimeError
    with pytest.raises(error, match="stop") if fails else contextlib.nullcontext():
        act(model, x)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert [(type(m), m.training) for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanting
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_made_in_inference_mode_is_counted_and_left_as_it_was() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    assert rp.count(model, torch.randn(2, 16)).macs == 2 * 16 * (16 + 4)
    assert all(p.requires_grad for p in model.parameters())


def test_inputs_that_do_not_fit_are_described() -> None:
    model = nn.Sequential(nn.Linear(16, 4))
    with pytest.raises(rp.RankPruneError, match=r"float32 tensor \(2, 8\) on cpu.*cannot be multiplied.*give a tensor"):
        rp.count(model, torch.randn(2, 8))
    with pytest.raises(rp.RankPruneError, match=r"call it with \(2, 16\): TypeError"):
        rp.count(model, (2, 16))


def test_a_count_is_printed_as_a_table() -> None:
    model = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.LSTM(4, 4))
    lines = str(rp.count(model, torch.randn(2, 3, 16))).splitlines()
    assert [line.split() for line in lines[:2]] == [["layer", "type", "MACs", "params"], ["0", "Linear", "384", "68"]]
    assert lines[-2:] == ["MACs 384 (outside of modules: 0), parameters 228", "not counted: 2"]


@BOTH
def test_buffers_assigned_in_the_forward_are_put_back(act: Callable) -> None:
    model = Stateful(assigns=True)
    calls, weight = model.calls, model.layer.weight
    act(model, torch.randn(3, 4))
    assert model.calls is calls
    assert not calls.any()
    assert model.layer.weight is weight
    model(torch.randn(3, 4)).sum().backward()  # an inference tensor left behind would refuse


def test_a_disabled_fast_path_stays_disabled() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        rp.count(nn.Linear(2, 2), torch.zeros(1, 2))
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_count_is_of_eval_mode_under_wrappers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    assert rp.count(wrapped, torch.zeros(2, 4)) == rp.count(model, torch.zeros(2, 4))
    assert {r.name for r in rp.count(wrapped, torch.zeros(2, 4)).layers} == {"0", "1"}


def test_tied_weights_are_one_set_of_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert rp.count(model, torch.zeros(1, 4)).params == 16


class Positions(nn.Module):
    """Gives a layer a part of one of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 4)
        self.layer.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.table[: x.shape[0]])


def test_parts_of_parameters_may_be_inputs_of_layers() -> None:
    model = Positions()
    assert rp.count(model, torch.zeros(3, 4)).macs == 3 * 4 * 4
    assert [p.requires_grad for p in model.parameters()] == [True, True, False]


class Scale(nn.Module):
    """One factor for each channel, as ConvNeXt's blocks have."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def test_a_scale_for_each_channel_is_no_matrix() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), Scale()), torch.zeros(1, 3, 8, 8)
    assert rp.count(model, x).uncounted == ()
    assert [layer.name for layer in rp.make_plan(model, x, rule=rp.FixedRank(1)).layers] == ["0", "1"]


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def test_what_is_compiled_within_stays_compiled() -> None:
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("eager")
    model = Body()
    model.compile(backend=compiler)
    rp.count(model, torch.zeros(2, 8))
    model(torch.zeros(2, 8))
    assert compiler.frame_count == 1


def test_a_compiled_child_that_comes_first() -> None:
    model = nn.Sequential(torch.compile(Body(), backend="eager"), nn.Linear(8, 4))
    assert rp.count(model, torch.zeros(2, 8)).macs == 2 * (64 + 32)


def test_spectral_norm_in_training_goes_on_as_if_it_had_not_been_counted() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32)),
        nn.utils.parametrizations.spectral_norm(nn.Embedding(4, 8)),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rp.count(model[0], torch.zeros(2, 32))
    with pytest.raises(rp.RankPruneError, match="has no layer to decompose"):
        rp.make_plan(model, rule=rp.FixedRank(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sparse_buffers() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacency", torch.eye(8).to_sparse())
            self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.sparse.mm(self.adjacency, self.body(x)))

    model = Graph()
    assert {row.name: row.macs for row in rp.count(model, torch.randn(8, 16)).layers} == {"body": 8 * 256, "head": 8 * 64}
    assert torch.equal(model.adjacency.to_dense(), torch.eye(8))


def test_a_model_on_the_meta_device_with_statistics() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.zeros(1, 3, 5, 5)
    assert rp.count(model, x).macs == 9 * 8 * 27


class Hyper(nn.Module):
    """Makes the weight of a convolution by a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(4, 8 * 3 * 9)

    def weight(self) -> torch.Tensor:
        return self.make(torch.ones(1, 4)).view(8, 3, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight())


def test_a_method_called_weight_makes_no_quantized_layer() -> None:
    counted = rp.count(nn.Sequential(Hyper()), torch.randn(1, 3, 8, 8))
    assert [(r.name, r.macs) for r in counted.layers] == [("0.make", 4 * 8 * 27)]
    assert counted.functional_macs == 8 * 27 * 36
