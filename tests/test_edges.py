"""What a sceptical user tried on the library: strange models, exchanged weights, misused arguments."""

import copy
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from rankprune.backends import BACKENDS


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).to(matrix.dtype)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no such setting")
def test_the_newer_precision_setting_does_no_harm():
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 4))
    best = low_rank(model[0].weight.detach(), 40)
    trp = rp.TRP(model, rule=rp.FixedRank(40))
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        for _ in range(2):  # the second starts from what the first found
            assert trp.project().ranks == {"0": 40}
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    torch.testing.assert_close(model[0].weight.detach(), best, rtol=0, atol=1e-5)


def test_one_pattern_may_be_a_plain_string():
    assert rp.make_plan(network(), rule=rp.FixedRank(2), include="2*").ranks == {"2": 2}
    assert rp.make_plan(network(), rule=rp.FixedRank(2), exclude="2*").ranks == {"0": 2}


def test_a_budget_out_of_reach_is_told_before_the_training():
    with pytest.raises(rp.RankPruneError, match=r"Budget\(macs=0.01.* cannot be met"):
        rp.TRP(network(), rule=rp.Budget(macs=0.01), ramp=1000, example_inputs=X)


def test_the_nuclear_term_shrinks_also_where_the_optimizer_ascends():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, maximize=True)
    rp.TRP(model, rule=rp.Energy(1.0), nuclear=1.0).attach(optimizer)
    before = torch.linalg.svdvals(model[2].weight.detach()).sum()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.linalg.svdvals(model[2].weight.detach()).sum() < before


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.register_buffer("scale", torch.ones(1).expand(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * self.scale)


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.table = network(), None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, 16)
        if "late" not in self._buffers:
            self.register_buffer("late", torch.ones(16))
        return self.body(x * self.table * self.late)


def test_a_buffer_that_cannot_be_written_to(tmp_path):
    model = Expanded()
    plan = rp.make_plan(model, X, rule=rp.FixedRank(2))
    small = rp.decompose(model, plan)
    rp.save(tmp_path, small, plan)
    assert torch.equal(rp.load(tmp_path, Expanded())(X), small(X))


def test_what_a_model_caches_while_it_is_measured_serves_training():
    model = Caching()
    keys = model.state_dict().keys()
    rp.measure(model, X, runs=1)
    rp.count(model, X)
    assert model.state_dict().keys() == keys
    model(X).sum().backward()
    assert model.body[0].weight.grad is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_child_is_skipped():
    model = network()
    model[2] = torch.jit.script(model[2])
    assert "2" not in rp.make_plan(model, rule=rp.FixedRank(2)).ranks


def test_another_default_device_does_no_harm():
    model, rule = network(), rp.Budget(macs=0.6)
    expected = rp.make_plan(model, X, rule=rule).ranks
    with torch.device("meta"):
        assert rp.make_plan(model, X, rule=rule).ranks == expected


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def __deepcopy__(self, memo: dict) -> "Stubborn":
        return Stubborn()


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.kept = network(), [threading.Lock()]


@pytest.mark.parametrize(("kind", "message"), [(Stubborn, "__deepcopy__ of this Stubborn"), (Locked, "cannot be copied")])
def test_a_model_that_cannot_be_copied_says_so(kind: Callable, message: str):
    model = kind()
    with pytest.raises(rp.RankPruneError, match=message):
        rp.decompose(model, rp.make_plan(model, rule=rp.FixedRank(2)))


def test_a_state_of_another_scheme_or_none_is_refused():
    def convolutions() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))

    state = rp.TRP(convolutions(), rule=rp.Energy(0.9), scheme="spatial").state_dict()
    with pytest.raises(rp.RankPruneError, match="scheme 'spatial'"):
        rp.TRP(convolutions(), rule=rp.Energy(0.9), scheme="channel").load_state_dict(state)
    with pytest.raises(rp.RankPruneError, match="no state of a TRP"):
        rp.TRP(convolutions(), rule=rp.Energy(0.9)).load_state_dict({})


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        (nn.Conv2d, {"padding": 0}),
        (nn.Conv2d, {"padding_mode": "reflect"}),
        (nn.Conv2d, {"stride": 2}),
        (nn.Conv2d, {"dilation": 2}),
        (nn.ConvTranspose2d, {"stride": 2, "output_padding": 1}),
    ],
    ids=str,
)
def test_an_artefact_of_another_geometry_is_refused(kind: type, other: dict, tmp_path):
    def convolutions(**options: int) -> nn.Sequential:
        first = {"stride": 2} if "output_padding" in other else {}
        return nn.Sequential(nn.Conv2d(3, 16, 3), kind(16, 16, 3, **{"padding": 1, **first, **options}))

    plan = rp.make_plan(convolutions(), rule=rp.FixedRank(2), scheme="spatial")
    rp.save(tmp_path, rp.decompose(convolutions(), plan), plan)
    rp.load(tmp_path, convolutions())
    with pytest.raises(rp.CheckpointError, match=rf"another architecture.*{list(other)[-1]}"):
        rp.load(tmp_path, convolutions(**other))


@pytest.mark.parametrize(
    "options", [{"ramp": 0.5}, {"freeze": 0.5}, {"ramp": 10, "freeze": 5}, {"rule": 0.5, "ramp": 10}], ids=str
)
def test_misused_arguments_of_trp(options: dict):
    with pytest.raises(rp.RankPruneError, match=r"ramp=|is not a rank rule"):
        rp.TRP(network(), **{"rule": rp.Energy(0.9), **options})


def test_attaching_to_something_else_says_what_is_wanted():
    model = network()
    with pytest.raises(rp.RankPruneError, match=r"takes a torch\.optim.Optimizer, not a Sequential"):
        rp.TRP(model, rule=rp.Energy(0.9)).attach(model)


class Bare(torch.optim.Optimizer):
    """A wrapper that leaves out the constructor of its base class, as Lookahead of timm does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()

    @property
    def param_groups(self) -> list:
        return self.optimizer.param_groups

    def step(self, closure: Callable | None = None) -> None:
        self.optimizer.step(closure)


def test_a_wrapper_whose_step_runs_no_hooks_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(rp.RankPruneError, match=r"step\(\) of this Bare runs no hooks; attach to the optimizer that it wraps"):
        rp.TRP(model, rule=rp.Energy(0.9)).attach(Bare(optimizer))


def test_lightning_fabric():
    """Its optimizer has the hooks of the one that it steps, and its module is looked through."""
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model = network()
    module, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    trp = rp.TRP(module, rule=rp.Energy(0.9), every=1).attach(optimizer)
    step(module, optimizer)
    assert trp.steps == len(trp.history) == 1
    assert type(trp.finalize()) is type(model)
    assert not any("module" in name for name in trp.history[0][1])


def test_a_step_captured_in_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trp = rp.TRP(model, rule=rp.Energy(0.9)).attach(optimizer)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(rp.RankPruneError, match="captured in a CUDA graph"):
        step(model, optimizer)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    step(model, optimizer)
    assert trp.steps == 1


def test_hooks_that_came_after_the_plan_are_not_lost_in_silence():
    model = network()
    plan = rp.make_plan(model, rule=rp.FixedRank(2))
    model[2].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.warns(UserWarning, match="layers 2 have got hooks since the plan was made"):
        rp.decompose(model, plan)


def test_what_cannot_be_saved_leaves_the_older_artefact_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = network()
    plan = rp.make_plan(model, rule=rp.FixedRank(2))
    small = rp.decompose(model, plan)
    rp.save(tmp_path, small, plan)
    other = rp.decompose(network(), plan)
    monkeypatch.setattr(rp.Plan, "to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rp.save(tmp_path, other, plan)
    assert torch.equal(rp.load(tmp_path, network())(X), small(X))
    monkeypatch.undo()
    rp.save(tmp_path, other, plan)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "rankprune.json"]


def test_a_convolution_built_with_numpys_numbers_can_be_saved(tmp_path: Path):
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=np.int64(1)), nn.Conv2d(16, 16, 3, stride=tuple(np.array([2, 2]))))
    plan = rp.make_plan(model, rule=rp.FixedRank(2), include=["1"])
    small = rp.decompose(model, plan)
    rp.save(tmp_path, small, plan)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(
        rp.load(tmp_path, nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2)))(x), small(x)
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_could_not_be_counted_is_in_the_plan():
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(16, 16)))
    plan = rp.make_plan(nn.Sequential(quantized, network()), X, rule=rp.Budget(macs=0.7))
    assert plan.uncounted == ("0.0",)
    assert "MACs not counted: 0.0" in str(plan)
    assert rp.Plan.from_json(plan.to_json()) == plan


def test_an_edited_plan_decomposes_but_is_not_saved_as_what_it_is_not(tmp_path):
    model = network()
    plan = rp.Plan.from_json(rp.make_plan(model, rule=rp.FixedRank(2)).to_json().replace('"rank": 2', '"rank": 3'))
    small = rp.decompose(copy.deepcopy(model), plan)
    assert small[2][0].out_features == 3
    with pytest.raises(rp.CheckpointError, match="with that very plan"):
        rp.save(tmp_path, small, plan)


def test_an_artefact_wants_a_folder(tmp_path: Path) -> None:
    model, file = network(), tmp_path / "file"
    plan = rp.make_plan(model, rule=rp.FixedRank(2))
    file.touch()
    with pytest.raises(rp.CheckpointError, match="is a file; give a folder"):
        rp.save(file, rp.decompose(model, plan), plan)


def test_weights_on_the_meta_device_are_told(tmp_path: Path) -> None:
    model = network()
    plan = rp.make_plan(model, rule=rp.FixedRank(2))
    rp.save(tmp_path, rp.decompose(model, plan), plan)
    with torch.device("meta"):
        empty = network()
    for use in (rp.decompose, rp.project):
        with pytest.raises(rp.RankPruneError, match="layer '0' is on the meta device"):
            use(empty, plan)
    with pytest.raises(rp.CheckpointError, match="meta device; build the model on a real one"):
        rp.load(tmp_path, empty)


class Counting(nn.Sequential):
    """Has more in its state than tensors."""

    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: int) -> None:
        pass


def test_a_state_that_is_no_tensor_cannot_be_saved(tmp_path: Path) -> None:
    model = Counting(*network())
    plan = rp.make_plan(model, rule=rp.FixedRank(2))
    with pytest.raises(rp.CheckpointError, match="'_extra_state', a int and no tensor"):
        rp.save(tmp_path, rp.decompose(model, plan), plan)


def test_a_package_that_is_there_but_does_not_work_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openvino.py").write_text("raise ImportError('libtbb.so.12 is missing\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    with pytest.raises(
        rp.MissingExtraError, match=r"'openvino', which cannot be imported \(libtbb.so.12 is missing\); install"
    ):
        BACKENDS["openvino"].require()
