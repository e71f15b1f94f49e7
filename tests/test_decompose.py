"""decompose: an exact, separate copy, whatever the model's plumbing."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from rankprune.recipes.resnet import CifarResNet
from rankprune.schemes import SCHEMES


def at_full_rank(plan: rp.Plan) -> rp.Plan:
    return replace(plan, layers=tuple(replace(e, rank=e.full_rank) for e in plan.layers))


def with_entry(plan: rp.Plan, name: str, fields: dict) -> rp.Plan:
    return replace(plan, layers=tuple(replace(e, **fields) if e.name == name else e for e in plan.layers))


def convolutional(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, **options),
        nn.BatchNorm2d(16, **options),
        nn.Conv2d(16, 24, 3, **options),
        nn.Dropout(0.5),
        nn.Conv2d(24, 16, 3, **options),
    )


class Uses(nn.Module):
    """Linear layers referred to in several ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 32)
        self.inner = nn.Linear(32, 32)
        self.again = self.inner
        self.other = nn.Linear(32, 32)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embed.weight
        self.order = [self.inner, self.other]  # a plain list: not registered
        self.by_name = {"other": self.other}
        self.register_buffer("scale", torch.ones(1))
        self.same_scale = self.scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        for layer in (*self.order, self.inner, self.again, self.by_name["other"]):
            y = y + layer(y).relu()
        return self.head(y * self.scale)


TOKENS = torch.arange(6).view(2, 3)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "linear"])
def test_full_rank_changes_no_output(scheme: str) -> None:
    torch.manual_seed(0)
    model = CifarResNet(14)
    x = torch.randn(4, 3, 8, 8)
    model(x)  # the running statistics leave their first values
    plan = at_full_rank(rp.make_plan(model, scheme=scheme, rule=rp.FixedRank(1), include=["*"]))
    assert len(plan.decomposed) == 14
    small = rp.decompose(model, plan)
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert not any(type(m) is nn.Conv2d and m.kernel_size == (3, 3) for m in small.modules()) or scheme != "spatial"


@pytest.mark.parametrize("training", [True, False])
def test_input_model_is_untouched(training: bool) -> None:
    model = convolutional().train(training)
    model[2].eval()
    before, rng = copy.deepcopy(model), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    tensors = [t.data_ptr() for t in model.state_dict().values()]
    plan = rp.make_plan(model, torch.randn(2, 3, 9, 9), rule=rp.FixedRank(2))
    rng = torch.get_rng_state()
    small = rp.decompose(model, plan)
    assert torch.equal(torch.get_rng_state(), rng)
    with torch.no_grad():
        for t in (*small.parameters(), *small.buffers()):
            t.add_(1)
    small.train(not training)
    assert str(model) == str(before)
    assert [m.training for m in model.modules()] == modes
    assert [t.data_ptr() for t in model.state_dict().values()] == tensors
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True))


def test_modes_follow() -> None:
    model = convolutional().train()
    model[2].eval()
    small = rp.decompose(model, rp.make_plan(model, rule=rp.FixedRank(2)))
    assert small.training
    assert not any(m.training for m in small[2].modules())
    assert all(m.training for m in small[4].modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_follows(dtype: torch.dtype) -> None:
    model = convolutional(dtype=dtype)
    small = rp.decompose(model, rp.make_plan(model, rule=rp.FixedRank(2)))
    assert {p.dtype for p in small.parameters()} == {dtype}


def test_channels_last_follows() -> None:
    model = convolutional().to(memory_format=torch.channels_last)
    small = rp.decompose(model, rp.make_plan(model, scheme="channel", rule=rp.FixedRank(2)))
    assert small[2][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not small[2][0].weight.is_contiguous()


def test_requires_grad_follows() -> None:
    model = convolutional()
    model[2].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    small = rp.decompose(model, rp.make_plan(model, rule=rp.FixedRank(2)))
    wanted = [(False, False, True), (True, True, False)]
    assert [tuple(p.requires_grad for p in pair.parameters()) for pair in (small[2], small[4])] == wanted


def test_tied_reused_and_unregistered_references() -> None:
    model = Uses()
    plan = rp.make_plan(model, TOKENS, rule=rp.FixedRank(4))
    assert plan.ranks == {"inner": 4, "other": 4}
    assert "shared with 'embed'" in plan.skipped["head"]
    rp.project(model, plan)
    small = rp.decompose(model, plan)
    torch.testing.assert_close(small(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)
    assert isinstance(small.inner, nn.Sequential)
    assert small.again is small.inner is small.order[0]
    assert small.other is small.order[1] is small.by_name["other"]
    assert small.head.weight is small.embed.weight is not model.embed.weight
    assert small.scale is small.same_scale is not model.scale
    assert rp.count(small, TOKENS).macs == plan.macs == 6 * (3 * 2 * 4 * 32 + 2 * 2 * 4 * 32 + 32 * 20)


def test_no_tensor_is_shared_with_the_original() -> None:
    model = Uses()
    small = rp.decompose(model, rp.make_plan(model, rule=rp.FixedRank(4)))
    theirs = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not theirs & {t.untyped_storage().data_ptr() for t in (*small.parameters(), *small.buffers())}


def test_model_that_is_one_layer() -> None:
    model = nn.Linear(32, 24)
    plan = rp.make_plan(model, rule=rp.FixedRank(3), include=["*"])
    assert plan.ranks == {"": 3}
    rp.project(model, plan)
    small = rp.decompose(model, plan)
    x = torch.randn(2, 5, 32)
    assert isinstance(small, nn.Sequential)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_transformer_encoder_keeps_off_the_fast_path_that_reads_weights(masked: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    plan = at_full_rank(rp.make_plan(model, x, rule=rp.FixedRank(1), include=["*linear?"]))
    assert len(plan.decomposed) == 4
    small = rp.decompose(model, plan)
    with torch.no_grad():
        wanted, found = model(x, src_key_padding_mask=mask), small(x, src_key_padding_mask=mask)
    kept = slice(None) if mask is None else ~mask
    torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("normed", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_weight_normed_layers_stay_and_work(normed: Callable) -> None:
    model = nn.Sequential(nn.Linear(32, 32), normed(nn.Linear(32, 32)), nn.Linear(32, 32), nn.Linear(32, 4))
    x = torch.randn(2, 32)
    plan = rp.make_plan(model, x, rule=rp.FixedRank(4))
    assert plan.ranks == {"0": 4, "2": 4}
    assert "1" in {name.partition(".")[0] for name in plan.skipped}
    rp.project(model, plan)
    model(x).sum().backward()  # the computed weight is now part of a graph, which deepcopy refuses
    small = rp.decompose(model, plan)
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


class Keeping(nn.Module):
    """Keeps what it computed, as torchvision's RAFT does in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = {"levels": [self.first(x)]}
        return self.last(self.kept["levels"][0])


def test_a_model_that_keeps_parts_of_a_graph_in_lists_is_copied() -> None:
    model, x = Keeping(), torch.randn(2, 32)
    model(x).sum().backward()
    plan = at_full_rank(rp.make_plan(model, x, rule=rp.FixedRank(4)))
    torch.testing.assert_close(rp.decompose(model, plan)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", [None, rp.FixedRank(2)])
def test_what_is_no_plan_is_refused(plan: object) -> None:
    with pytest.raises(rp.RankPruneError, match=r"decompose\(\) takes a Plan"):
        rp.decompose(nn.Linear(8, 8), plan)  # type: ignore[arg-type]


def test_pairs_made_in_inference_mode_can_be_trained() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), torch.randn(2, 16)
    with torch.inference_mode():
        small = rp.decompose(model, rp.make_plan(model, x, rule=rp.FixedRank(2)))
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_decomposing_is_deterministic() -> None:
    model = convolutional()
    plan = rp.make_plan(model, rule=rp.FixedRank(3))
    a, b = (rp.decompose(model, plan).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


UNFIT = {
    "'8'": {"name": "8"},
    "(5, 5)": {"shape": (5, 5)},
    "Conv3d": {"kind": "Conv3d"},
    "tucker": {"scheme": "tucker"},
    "999": {"rank": 999},
}


@pytest.mark.parametrize("act", [rp.decompose, rp.project])
@pytest.mark.parametrize(("named", "fields"), UNFIT.items(), ids=UNFIT)
def test_plan_that_does_not_fit(act: Callable, named: str, fields: dict) -> None:
    model = convolutional()
    before = copy.deepcopy(model.state_dict())
    plan = with_entry(rp.make_plan(model, rule=rp.FixedRank(2)), "2", fields)
    with pytest.raises(rp.RankPruneError, match=re.escape(named)):
        act(model, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weight_that_is_not_finite() -> None:
    model = convolutional()
    plan = rp.make_plan(model, rule=rp.FixedRank(2))
    model[4].weight.data.fill_(torch.nan)
    with pytest.raises(rp.FactorizationError, match="'4'"):
        rp.decompose(model, plan)
