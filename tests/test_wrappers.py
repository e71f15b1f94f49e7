"""What stands around a user's model, or around a part of it: torch.compile, DataParallel and the like."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import rankprune as rp
from rankprune.projection import project
from rankprune.state_dicts import load_exactly, read_tensors, save_tensors
from rankprune.wrappers import unwrap

pytestmark = pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks:UserWarning")


class Net(nn.Module):
    """A plain linear layer, another part, and a last linear layer."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.plain, self.odd, self.last = nn.Linear(16, 16), odd, nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.odd(self.plain(x)))


WRAPPERS = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "data parallel": nn.DataParallel,
    "both": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    "the other way round": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
    "an average of weights": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_looked_through(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model, x = Net(nn.Linear(16, 16)), torch.randn(2, 16)
    assert type(unwrap(wrap(model))) is Net
    plan = rp.make_plan(wrap(model), x, rule=rp.FixedRank(2))
    assert plan == rp.make_plan(model, x, rule=rp.FixedRank(2))
    small = rp.decompose(wrap(model), plan)
    assert type(small) is Net
    wrapped = wrap(model)
    project(wrapped, plan)
    assert torch.allclose(small(x), wrapped(x), atol=1e-5)
    rp.save(tmp_path, wrap(small), plan)
    loaded = rp.load(tmp_path, wrap(Net(nn.Linear(16, 16))))
    assert type(loaded) is Net
    assert torch.equal(loaded(x), small(x))
    rp.export_onnx(wrap(small), x, tmp_path / "small.onnx")


def test_flat_shards_are_refused_with_what_to_use_instead() -> None:
    kind = type("FullyShardedDataParallel", (nn.Sequential,), {})
    with pytest.raises(rp.RankPruneError, match="fully_shard"):
        rp.make_plan(kind(nn.Linear(8, 8), nn.Linear(8, 8)), rule=rp.FixedRank(2))
    fabric = pytest.importorskip("lightning.fabric.wrappers")  # whose inner module shows nothing of it
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(rp.RankPruneError, match="fully_shard"):
        rp.make_plan(fabric._FabricModule(kind(model), None, model), rule=rp.FixedRank(2))


def test_a_compiled_layer_inside_a_model_still_runs() -> None:
    model, x = Net(nn.Sequential(nn.Linear(16, 16), nn.ReLU())), torch.randn(2, 16)
    model.odd = torch.compile(model.odd, backend="eager")
    plan = rp.make_plan(model, x, rule=rp.FixedRank(2))
    assert "odd._orig_mod.0" in plan.ranks
    project(model, plan)
    with torch.no_grad():
        assert torch.allclose(rp.decompose(model, plan)(x), model(x), atol=1e-5)


def checkpointed() -> Net:
    """With activation checkpointing of a block and of a single layer, as Accelerate and FSDP2 recipes set it up."""
    model = Net(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
    model.odd = checkpoint_wrapper(model.odd)
    model.plain = checkpoint_wrapper(model.plain)
    return model


def test_activation_checkpointing_leaves_names_alone(tmp_path: Path) -> None:
    model, fresh, x = checkpointed(), Net(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))), torch.randn(8, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trp = rp.TRP(model, rule=rp.FixedRank(2), every=1, nuclear=1e-3, example_inputs=x).attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    rp.TRP(fresh, rule=rp.FixedRank(2), every=1, nuclear=1e-3, example_inputs=x).load_state_dict(trp.state_dict())
    small, into = trp.finalize(), trp.finalize(into=fresh)
    assert trp.plan is not None
    assert trp.plan.ranks == {"plain": 2, "odd.0": 2, "odd.2": 2}
    assert rp.count(small, x).macs < rp.count(model, x).macs
    rp.save(tmp_path, small, trp.plan)
    loaded = rp.load(tmp_path, Net(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))))
    for other in (small, into, loaded, rp.load(tmp_path, checkpointed())):
        assert torch.allclose(other(x), model(x), atol=1e-5)


class Head(nn.Module):
    """Two names for one weight, and statistics that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.ones(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.scale


def test_dtypes_ties_and_unsaved_buffers_within_activation_checkpointing(tmp_path: Path) -> None:
    def build(wrap: bool) -> Net:
        net = Net(Head())
        net.odd = checkpoint_wrapper(net.odd) if wrap else net.odd
        return net

    model = build(True).to(torch.bfloat16)
    plan = rp.make_plan(model, rule=rp.FixedRank(2))
    small = rp.decompose(model, plan)
    rp.save(tmp_path, small, plan)
    assert json.loads((tmp_path / "rankprune.json").read_text())["buffers"] == {"odd.scale": "bfloat16"}
    for wrap in (False, True):
        loaded = rp.load(tmp_path, build(wrap))
        assert {t.dtype for t in (*loaded.parameters(), *loaded.buffers())} == {torch.bfloat16}
        x = torch.randn(2, 16, dtype=torch.bfloat16)
        assert torch.equal(loaded(x), small(x))
    save_tensors(tmp_path / "dense.safetensors", model)
    load_exactly(build(True), read_tensors(tmp_path / "dense.safetensors"), "dense")
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    tensors["odd.b.weight"] += 1
    with pytest.raises(rp.CheckpointError, match=r"different values for 'odd\.a\.weight' and 'odd\.b\.weight'"):
        load_exactly(build(True), tensors, "dense")


def test_a_checkpointed_block_whose_forward_was_compiled_does_not_run_the_original() -> None:
    model, x = checkpointed(), torch.randn(2, 16)
    model.odd.forward = torch.compile(model.odd.forward, backend="eager")
    plan = rp.make_plan(model, rule=rp.FixedRank(1))
    small = rp.decompose(model, plan)
    plain = checkpointed()
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(small(x), rp.decompose(plain, plan)(x), atol=1e-6)


class Reading(nn.Module):
    """Its own code reads the weight of a layer, as T5's does."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.plain, self.last = checkpoint_wrapper(nn.Linear(16, 16)), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.plain(self.read(x.to(self.read.weight.dtype))))


def test_a_checkpointed_layer_that_other_code_reads_stays() -> None:
    plan = rp.make_plan(Reading(), torch.zeros(1, 16), rule=rp.FixedRank(2))
    assert "reads its 'weight'" in plan.skipped["read"]
    assert plan.ranks == {"plain": 2}


def test_a_checkpointed_model_whose_forward_is_a_function_is_refused() -> None:
    model = Net(nn.Linear(16, 16))
    inner = model.forward
    model.forward = lambda x: inner(x)
    plan = rp.make_plan(model, rule=rp.FixedRank(2))
    with pytest.raises(rp.RankPruneError, match="has been replaced on the instance by a function"):
        rp.decompose(checkpoint_wrapper(model), plan)
