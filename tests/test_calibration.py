import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankprune as rp
from rankprune import calibration
from rankprune.calibration import whitenings
from rankprune.planner import Planner
from rankprune.schemes import SCHEMES


def correlated(*shape: int) -> Tensor:
    """Inputs whose channels, and whose neighbouring pixels, go together."""
    x = torch.randn(*shape)
    x = x + 2 * x.roll(1, dims=1) if x.dim() < 3 else x
    for axis in range(2, x.dim()):
        x = x + x.roll(1, dims=axis)
    mix = torch.randn(shape[1], shape[1]) * torch.logspace(0, -2, shape[1])
    return (x.movedim(1, -1) @ mix).movedim(-1, 1)


def loss(small: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((small(x) - model(x)).square().sum())


def both(model: nn.Module, x: Tensor, scheme: str, rank: int) -> tuple[float, float]:
    """The squared output error without and with calibration at one rank."""
    plan = rp.make_plan(model, x, scheme=scheme, rule=rp.FixedRank(rank), include=["*"], calibration=[x])
    assert plan.ranks
    with pytest.warns(UserWarning, match="chosen by the layers' outputs on calibration inputs"):
        plain = rp.decompose(model, plan)
    return loss(plain, model, x), loss(rp.decompose(model, plan, calibration=[x]), model, x)


def test_a_linear_layer_loses_the_least_that_any_factors_of_its_rank_can():
    model, x = nn.Sequential(nn.Linear(16, 12)), correlated(200, 16)
    plain, calibrated = both(model, x, "channel", 4)
    outputs = x.double() @ model[0].weight.detach().double().T
    optimum = float(torch.linalg.svdvals(outputs)[4:].square().sum())
    assert calibrated == pytest.approx(optimum, rel=1e-3)
    assert plain > 1.2 * optimum


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 10, 3, padding=1, stride=2, bias=False),
        nn.Conv2d(6, 10, 3, padding=2, padding_mode="reflect", bias=False),
        nn.Conv2d(6, 10, 3, padding=2, padding_mode="replicate", bias=False),
        nn.Conv2d(6, 10, (5, 3), padding=(4, 2), padding_mode="circular", bias=False),
        nn.Conv1d(6, 10, 4, padding="same", bias=False),
        nn.Conv3d(6, 10, 3, padding=1, bias=False),
    ],
    ids=["zeros", "reflect", "replicate", "circular", "same", "3d"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_so_does_a_channel_wise_convolution(layer):
    model, x = nn.Sequential(layer), correlated(8, 6, *[7] * len(layer.kernel_size))
    plain, calibrated = both(model, x, "channel", 4)
    outputs = model(x).detach().double().movedim(1, -1).flatten(0, -2)
    optimum = float(torch.linalg.svdvals(outputs)[4:].square().sum())
    assert calibrated == pytest.approx(optimum, rel=1e-3)
    assert plain > 1.2 * optimum


@pytest.mark.parametrize(("scheme", "rank"), [("spatial", 6), ("decoupled", 1)])
def test_the_other_schemes_lose_less_than_without(scheme, rank):
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)), correlated(8, 8, 10, 10)
    plain, calibrated = both(model, x, scheme, rank)
    assert calibrated < 0.9 * plain


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "linear"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
        nn.Conv2d(6, 8, (3, 5), stride=(2, 1), dilation=(1, 2), padding=(1, 4), padding_mode="reflect"),
        nn.Conv1d(6, 8, 4, padding="same"),
        nn.Conv3d(6, 8, 3, padding="valid", bias=False),
        nn.ConvTranspose2d(6, 8, 3, stride=2),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_at_full_rank_calibration_changes_no_output(layer, scheme):
    model, x = nn.Sequential(layer), torch.randn(4, 6, *[10] * len(layer.kernel_size))
    matrices = SCHEMES[scheme].to_matrices(layer, layer.weight.detach())
    plan = rp.make_plan(model, rule=rp.FixedRank(1), scheme=scheme, include=["*"])
    if not plan.ranks:
        pytest.skip("rank 1 is not cheaper")
    full = rp.Plan.from_json(plan.to_json().replace('"rank": 1,', f'"rank": {min(matrices.shape[1:])},'))
    torch.testing.assert_close(rp.decompose(model, full, calibration=[x])(x), model(x), rtol=1e-3, atol=1e-4)


def test_patches_are_those_of_unfold():
    layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), torch.randn(3, 4, 11, 9)
    found = SCHEMES["channel"].input_patches(layer, x)
    expected = F.unfold(x, 3, dilation=2, padding=1, stride=2).unflatten(1, (2, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    assert torch.equal(found, expected)


def test_patches_of_decoupled_are_the_channels_of_each_group():
    layer, x = nn.Conv2d(4, 6, 3, groups=2), torch.randn(3, 4, 5, 5)
    found = SCHEMES["decoupled"].input_patches(layer, x)
    for patches, group in zip(found, x.chunk(2, 1), strict=True):
        assert torch.equal(patches, group.movedim(1, -1).flatten(0, -2))


def test_a_groups_whitening_is_for_all_of_its_outputs():
    layer, x = nn.Conv2d(4, 6, 3, groups=2), correlated(32, 4, 5, 5)
    ((_, found),) = whitenings(layer, {("", "decoupled"): (layer, SCHEMES["decoupled"])}, [x])
    stack, white = SCHEMES["decoupled"].to_matrices(layer, layer.weight.detach()), found["", "decoupled"]
    assert len(white.root) == 2
    expected = [white.root[0] @ m for m in stack[:3].double()] + [white.root[1] @ m for m in stack[3:].double()]
    torch.testing.assert_close(white.apply(stack), torch.stack(expected))
    left, right = white.undo(white.apply(stack), torch.eye(9).double().expand(6, 9, 9))
    torch.testing.assert_close(left @ right, stack.double(), rtol=1e-6, atol=1e-8)


def test_a_loader_of_inputs_and_labels_is_told_what_to_leave_out():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3)), correlated(16, 3, 6, 6)
    plan = rp.make_plan(model, rule=rp.FixedRank(2), include=["*"])
    with pytest.raises(rp.RankPruneError, match=r"does not run on these calibration inputs.*for x, _ in loader"):
        rp.decompose(model, plan, calibration=[(x, torch.zeros(16))])


def test_a_convolution_may_get_an_empty_batch():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3)), correlated(16, 3, 6, 6)
    plan = rp.make_plan(model, rule=rp.FixedRank(2), scheme="channel", include=["*"])
    whole = rp.decompose(model, plan, calibration=[x])
    parts = rp.decompose(model, plan, calibration=[x, x[:0]])
    assert torch.equal(parts(x), whole(x))
    plain = rp.decompose(model, plan, calibration=[x[:0]])
    torch.testing.assert_close(plain(x), rp.decompose(model, plan)(x), rtol=1e-4, atol=1e-5)


def test_ranks_follow_the_outputs_where_calibrated():
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), torch.randn(64, 16)
    x[:, 3:] = 0  # three inputs matter
    plan = rp.make_plan(model, x, rule=rp.Energy(0.999), calibration=[x])
    assert plan.ranks == {"0": 3}
    assert rp.make_plan(model, x, rule=rp.Energy(0.999)).ranks == {}


def test_one_tensor_or_dict_is_no_list_of_batches():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    plan = rp.make_plan(model, rule=rp.FixedRank(4))
    for one in (torch.zeros(8, 16), {"input": torch.zeros(8, 16)}):
        with pytest.raises(rp.RankPruneError, match="give a list of batches"):
            rp.decompose(model, plan, calibration=one)
        with pytest.raises(rp.RankPruneError, match="give a list of batches"):
            Planner(model, rule=rp.FixedRank(4), scheme="auto", calibration=one)  # before anything is timed


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(x))


def test_a_compiled_model_is_calibrated_too():
    torch.manual_seed(0)
    model, inputs = Two().eval(), [torch.randn(64, 16) * torch.logspace(0, -3, 16)]
    plan = rp.make_plan(model, rule=rp.FixedRank(4))
    expected = rp.decompose(model, plan, calibration=inputs)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager")
    with torch.no_grad():
        compiled(inputs[0])
    found = rp.decompose(compiled, plan, calibration=inputs)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_the_model_is_left_as_it_was_and_no_inputs_are_an_error():
    model, x = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).train(), torch.randn(8, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = rp.make_plan(model, x, rule=rp.FixedRank(2), calibration=iter([x, x]))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0]._forward_pre_hooks
    with pytest.raises(rp.RankPruneError, match="calibration= holds no inputs"):
        rp.decompose(model, plan, calibration=[])


def test_a_model_that_changes_its_inputs_changes_none_of_the_users():
    class Normalising(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(3).div_(2))

    torch.manual_seed(0)
    model, images = Normalising(nn.Linear(8, 8), nn.Linear(8, 4)), correlated(32, 8)
    before = images.clone()
    plan = rp.make_plan(model, rule=rp.FixedRank(2), calibration=[images[:16], images[16:]])
    rp.decompose(model, plan, calibration=[images])
    assert torch.equal(images, before)


def test_every_sample_counts_the_same_however_they_are_batched():
    model, x = nn.Sequential(nn.Linear(16, 12)), correlated(65, 16)
    x[-1] *= 20
    plan = rp.make_plan(model, rule=rp.FixedRank(4), include=["*"])
    whole = rp.decompose(model, plan, calibration=[x])
    parts = rp.decompose(model, plan, calibration=[x[:40], x[40:64], x[64:], x[:0]])
    torch.testing.assert_close(parts(x), whole(x), rtol=1e-4, atol=1e-5)


def test_in_parts_it_is_the_same_and_an_iterator_will_do(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 8)), correlated(64, 16)
    runs = []
    model.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))

    def made() -> tuple[rp.Plan, nn.Module]:
        plan = rp.make_plan(model, rule=rp.FixedRank(3), include=["*"], calibration=iter([x[:40], x[40:]]))
        return plan, rp.decompose(model, plan, calibration=iter([x[:40], x[40:]]))

    plan, whole = made()
    assert runs == 2 * [40, 24]
    monkeypatch.setattr(calibration, "_HELD", 300)  # 256, then 144 and 144
    runs.clear()
    parts_plan, parts = made()
    assert runs == 4 * [40, 24]
    assert parts_plan == plan
    assert all(torch.equal(a, b) for a, b in zip(parts.parameters(), whole.parameters(), strict=True))


def test_a_layer_that_got_nothing_but_zeros_is_truncated_as_without_calibration():
    model, x = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 12)), torch.randn(8, 16)
    model[0].bias.data.fill_(-1e3)
    plan = rp.make_plan(model, x, rule=rp.FixedRank(4), include=["*"])
    plain, calibrated = rp.decompose(model, plan), rp.decompose(model, plan, calibration=[x])
    assert all(torch.equal(a, b) for a, b in zip(plain[2].parameters(), calibrated[2].parameters(), strict=True))


def test_inputs_that_are_not_finite_are_named_and_not_the_weight():
    model, x = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 12)), torch.randn(8, 16)
    plan = rp.make_plan(model, rule=rp.FixedRank(4), include=["*"])
    x[3, 4] = float("nan")
    with pytest.raises(rp.RankPruneError, match="the input of layer '0' holds NaN"):
        rp.decompose(model, plan, calibration=[x])


def test_a_stack_of_encoders_with_a_padding_mask_is_calibrated():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = {"src": torch.randn(2, 3, 16), "src_key_padding_mask": torch.tensor([[False, False, True], [False, False, False]])}
    plan = rp.make_plan(model, x, rule=rp.RankFraction(0.25), include=["*"], calibration=[x])
    assert len(plan.ranks) == 4
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        assert rp.decompose(model, plan, calibration=[x])(**x).isfinite().all()


def test_inputs_are_unrolled_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 12, 3), nn.Conv2d(12, 12, 3)), correlated(7, 4, 9, 9)
    plan = rp.make_plan(model, x, scheme="channel", rule=rp.FixedRank(3), include=["*"])
    whole = rp.decompose(model, plan, calibration=[x])
    sizes, unroll = [], SCHEMES["channel"].input_patches

    def noting(layer: nn.Module, x: Tensor) -> Tensor | None:
        patches = unroll(layer, x)
        sizes.append(0 if patches is None else patches.numel())
        return patches

    monkeypatch.setattr(calibration, "_UNROLLED", 2 * 12 * 49 * 9)
    monkeypatch.setattr(type(SCHEMES["channel"]), "input_patches", lambda self, layer, x: noting(layer, x))
    parts = rp.decompose(model, plan, calibration=[x])
    assert len(sizes) > 2
    assert max(sizes) <= 2 * 12 * 49 * 9
    torch.testing.assert_close(parts(x), whole(x), rtol=1e-4, atol=1e-4)


def test_how_many_inputs_there_are_changes_neither_ranks_nor_the_balance_of_factors():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 4)), correlated(64, 16)
    values = rp.make_plan(model, x, rule=rp.SingularValue(0.3), include=["0"], calibration=[x])
    again = rp.make_plan(model, x, rule=rp.SingularValue(0.3), include=["0"], calibration=[x] * 50)
    assert values.projected["0"].rank == again.projected["0"].rank
    assert 1 < (values.projected["0"].rank or 0) < 12
    plan = rp.make_plan(model, rule=rp.FixedRank(4), include=["0"])
    for times in (1, 50):
        left, right = rp.decompose(model, plan, calibration=[x] * times)[0]
        assert float(left.weight.detach().norm() / right.weight.detach().norm()) == pytest.approx(1, rel=1e-4)


def test_patches_go_by_a_padding_that_was_set_later():
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(3, 4, 5, 5)
    layer.padding, layer.dilation = (4, 3), (4, 3)  # as encoders for segmentation do with their last stages
    expected = F.unfold(x, 3, dilation=(4, 3), padding=(4, 3)).permute(0, 2, 1).flatten(0, 1)
    assert torch.equal(SCHEMES["channel"].input_patches(layer, x)[0], expected)
    rows = SCHEMES["spatial"].input_patches(layer, x)
    assert rows is not None
    assert rows.shape[1] == 3 * 5 * 5
