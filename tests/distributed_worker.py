"""What each process of a torchrun does in test_distributed.py: train under TRP together, and compare with one process alone.

torchrun --standalone --nproc-per-node=2 distributed_worker.py MODE
"""

import copy
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import rankprune as rp
from distributed_latency import latency, latency_sharded
from distributed_recipe import plan_once, recipe, recipe_killed
from distributed_setup import EVERY, STEPS, batches, evaluate, go_on, make, network, sgd, together, train, whole
from rankprune import linalg
from rankprune.distributed import reshard
from rankprune.schemes import SCHEMES


def compare(mode: str) -> None:
    """Together and alone end with the same weights, plan and decomposed network; all processes with the very same."""
    rank, size = dist.get_rank(), dist.get_world_size()
    alone = [dist.new_group([r]) for r in range(size)][rank]
    reference = network()
    reference_trp = make(reference, alone)
    train(reference, reference_trp, 0, 1)

    model, trainee = together(mode)
    evaluate(trainee)
    trp = make(trainee)
    train(trainee, trp, rank, size, lambda step: evaluate(trainee))
    evaluate(trainee)
    assert trp._factorizer.team.size == size
    owners = set(trp._factorizer.owner.values())
    assert owners == set(range(size)), f"the layers are shared out: {owners}"
    if mode != "ddp":
        with pytest.raises(rp.RankPruneError, match="into="):
            trp.finalize()
        assert trp.plan is not None
        for act in (rp.decompose, rp.project):
            with pytest.raises(rp.RankPruneError, match="is sharded over processes"):
                act(trainee, trp.plan)
        evaluate(trainee)
        name, rank_of_it = next(iter(trp.project().ranks.items()))
        assert hasattr(model.get_submodule(name).weight, "full_tensor"), "projected are the shards"
        assert numerical_rank(model.get_submodule(name).get_parameter("weight"), trp.plan, name) == rank_of_it
        evaluate(trainee)
    small, reference_small = trp.finalize(None if mode == "ddp" else network()), reference_trp.finalize()

    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        weight = whole(ours)
        everyone = [torch.empty_like(weight) for _ in range(size)]
        dist.all_gather(everyone, weight)
        assert all(torch.equal(weight, other) for other in everyone), f"{name} differs between processes"
        assert torch.allclose(weight, theirs, rtol=1e-3, atol=1e-4), f"{name} differs from one process alone"
    assert trp.plan is not None
    assert reference_trp.plan is not None
    assert trp.plan.ranks == reference_trp.plan.ranks
    assert [step for step, _ in trp.history] == [step for step, _ in reference_trp.history]
    x = batches()[0][0]
    assert torch.allclose(small(x), reference_small(x), rtol=1e-2, atol=1e-3)
    with torch.no_grad():
        dense = network()
        dense.load_state_dict({name: whole(value) for name, value in model.state_dict().items()})
        assert (small(x) - dense(x)).abs().max() < 1e-4
    resumed = make(trainee)
    resumed.load_state_dict(trp.state_dict())


def numerical_rank(weight: Tensor, plan: rp.Plan, name: str) -> int:
    """The largest rank of a weight's matrices under the scheme that the plan has for it."""
    entry = plan.decomposed[name]
    module = network().get_submodule(name)
    stack = SCHEMES[entry.scheme or ""].to_matrices(module, whole(weight))
    values = torch.linalg.svdvals(stack.double())
    return int((values > 1e-5 * values[..., :1]).sum(-1).max())


def full_terms(trp: rp.TRP) -> dict[str, Tensor]:
    """The sub-gradients in whole."""
    return {name: whole(term) for name, term in (trp._iteration.subgradients or {}).items()}


def resume(mode: str) -> None:
    """Stopped and resumed from the TRP state of one process, a training takes the steps that it would have taken.

    Of replicated weights, and alone, bit for bit until the next projection; of sharded ones the sub-gradients are taken anew,
    over the planned ranks, which right after a projection gives the same ones.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    for stop, cadence in ((EVERY, "step"), (EVERY, "projection"), (EVERY + 1, "step")):
        model, trainee = together(mode)
        trp, optimizer = make(trainee, nuclear_cadence=cadence), sgd(trainee)
        trp.attach(optimizer)
        go_on(trainee, optimizer, rank, size, range(stop))
        states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        saved: list[Any] = [trp.state_dict()]
        dist.broadcast_object_list(saved, src=size - 1)

        other, resumed_trainee = together(mode)
        resumed, other_optimizer = make(resumed_trainee, nuclear_cadence=cadence), sgd(resumed_trainee)
        other.load_state_dict(states[0])
        other_optimizer.load_state_dict(states[1])
        resumed.load_state_dict(saved[0])
        resumed.attach(other_optimizer)
        exact = mode == "ddp" or size == 1
        for step in range(stop, STEPS):
            go_on(trainee, optimizer, rank, size, [step])
            go_on(resumed_trainee, other_optimizer, rank, size, [step])
            ours, theirs = full_terms(resumed), full_terms(trp)
            assert ours.keys() == theirs.keys()
            assert cadence == "projection" or ours
            for name, term in ours.items():
                assert torch.allclose(term.norm(), theirs[name].norm(), rtol=1e-3), f"{name}: taken over other ranks"
            before_projection = step + 1 < 2 * EVERY
            for (name, a), b in zip(other.named_parameters(), model.parameters(), strict=True):
                if exact and (before_projection or size == 1):
                    assert torch.equal(whole(a), whole(b)), f"{name} differs at step {step}, resumed at {stop}"
                elif before_projection and stop == EVERY:
                    assert torch.allclose(whole(a), whole(b), rtol=1e-5, atol=1e-7), f"{name} differs at step {step}"
                else:
                    assert torch.allclose(whole(a), whole(b), rtol=1e-3, atol=1e-4), f"{name} differs at step {step}"
        assert resumed.history == trp.history


def resume_elsewhere() -> None:
    """The state of an unsharded training goes on in a sharded one: its sub-gradients are sharded too."""
    rank, size = dist.get_rank(), dist.get_world_size()
    _, trainee = together("ddp")
    trp = make(trainee)
    train(trainee, trp, rank, size)
    sharded, _ = together("fsdp")
    resumed = make(sharded)
    evaluate(sharded)
    resumed.load_state_dict(trp.state_dict())
    for name, term in full_terms(resumed).items():
        assert torch.equal(term, full_terms(trp)[name])
    reshard(sharded)  # for the optimizer, which is made after the evaluation
    train(sharded, resumed, rank, size)


def disagree() -> None:
    """Processes that would wait for each other at different steps, or exchange weights of different layers, are told."""
    rank, trained = dist.get_rank(), network()
    trp, resumed = make(trained), make(network())
    train(trained, trp, 0, 1)
    if rank == 1:
        resumed.load_state_dict(trp.state_dict())
    differing = {
        "layers": rp.TRP(nn.Linear(8, 8 + rank), rule=rp.FixedRank(2), include=["*"]),
        "rules": make(network(), rule=rp.Budget(macs=0.3 + 0.1 * rank)),
        "schedules": make(network(), every=2 + rank),
        "the step of the last projection, ramps, steps": resumed,
    }
    for what, one in differing.items():
        with pytest.raises(rp.RankPruneError, match=f"2 processes differ in {what}"):
            one.attach(sgd(one.model))
        assert not one.attached


def fail_late() -> None:
    """Whatever goes wrong in the work of one process before it sends results, all are told."""
    rank = dist.get_rank()

    def broken(*args: object) -> None:
        raise MemoryError("too little memory")

    channel = type(SCHEMES["channel"])
    for nuclear, holder, function in (
        (0.0, linalg, "project"),
        (1e-2, linalg, "project_with_subgradient"),
        (1e-2, linalg, "nuclear_subgradient"),
        (0.0, channel, "to_matrices"),
    ):
        model = network()
        trp = make(model, scheme="channel", nuclear=nuclear, ramp=0, rule=rp.RankFraction(0.2), every=1)
        optimizer = sgd(model)
        trp.attach(optimizer)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(holder, function, broken)
            with pytest.raises(MemoryError if rank == 1 else rp.RankPruneError, match="too little memory") as raised:
                go_on(model, optimizer, 0, 1, range(1))
        assert rank == 1 or "process 1 of 2" in str(raised.value)
        print(f"process {rank} was told of {function}", flush=True)


def without_scatter() -> None:
    """torch 2.6 cannot distribute a tensor from a chosen process."""

    def distribute_tensor(tensor: Tensor, device_mesh: object = None, placements: object = None) -> Tensor:
        raise AssertionError("it would take the tensor of process 0")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed.tensor, "distribute_tensor", distribute_tensor)
        compare("fsdp")


def fail() -> None:
    """A weight that only its owner sees as broken: the error reaches every process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = network()
    trp = make(model)

    def damage(step: int) -> None:
        if step == EVERY - 1:
            name = next(n for n, owner in trp._factorizer.owner.items() if owner == 1)
            if rank == 1:
                with torch.no_grad():
                    model.get_submodule(name).weight.fill_(float("nan"))

    with pytest.raises(rp.RankPruneError, match="NaN") as raised:
        train(model, trp, rank, size, damage)
    assert isinstance(raised.value, rp.FactorizationError) == (rank == 1)
    assert rank == 1 or "process 1 of 2" in str(raised.value)
    print(f"process {rank} was told", flush=True)


def warm_up() -> None:
    """A first step at a learning rate of 0 counts on all processes, also where one has no shard of what has a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 1))
    nn.init.zeros_(model[2].weight)
    fully_shard(model[1])  # a layer by itself
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trp = rp.TRP(model, rule=rp.FixedRank(2), every=1, example_inputs=torch.ones(1, 16)).attach(optimizer)
    (model(torch.ones(4, 16)) - 1).square().mean().backward()
    model[2].bias.grad = None
    optimizer.step()
    assert trp.steps == 1, f"process {dist.get_rank()} counted {trp.steps}"
    assert trp.history == [(1, {"0": 2, "1": 2})]
    whole = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 1))
    small, x = trp.finalize(into=whole), torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small(x), model(x))


class Reading(nn.Module):
    """Its own code reads the weight of a layer, as T5's does."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.plain, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.plain(self.read(x.to(self.read.weight.dtype))))


def reading() -> None:
    """Sharded layers of which other code reads the weight are left alone, like whole ones."""
    model = Reading()
    fully_shard(model)
    plan = rp.make_plan(model, torch.zeros(1, 16), rule=rp.FixedRank(2))
    assert "reads its 'weight'" in plan.skipped["read"], plan.skipped
    assert plan.ranks == {"plain": 2}


def tensor_parallel() -> None:
    """Layers that are split over processes are left alone, and train on beside those that are not."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    plan = rp.make_plan(model, torch.zeros(1, 16), rule=rp.FixedRank(2))
    assert "hooks" in plan.skipped["0"], plan.skipped
    assert "hooks" in plan.skipped["2"], plan.skipped
    assert plan.ranks == {"4": 2}
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.FixedRank(2), every=1, example_inputs=torch.zeros(1, 16)).attach(optimizer)
    model(torch.ones(4, 16)).square().mean().backward()
    optimizer.step()
    assert trp.history == [(1, {"4": 2})]
    assert torch.linalg.matrix_rank(model[4].weight.detach(), rtol=1e-4) == 2


def parted() -> None:
    """Once the processes have parted, each finalizes replicated weights alone, and is told where shards are out of reach."""
    trained = []
    for mode in ("ddp", "fsdp-root"):
        model, trainee = together(mode)
        trp = make(trainee)
        train(trainee, trp, dist.get_rank(), dist.get_world_size())
        trained.append((model, trp))
    dist.destroy_process_group()
    (model, trp), (_, sharded) = trained
    small, x = trp.finalize(), batches()[0][0]
    with torch.no_grad():
        assert (small(x) - model(x)).abs().max() < 1e-4
    with pytest.raises(rp.RankPruneError, match="before the group is destroyed"):
        sharded.finalize(network())


def die() -> None:
    """One process is gone in the middle of a training."""
    model = nn.parallel.DistributedDataParallel(network())

    def kill(step: int) -> None:
        if step == EVERY and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train(model, make(model), dist.get_rank(), dist.get_world_size(), kill)
    raise AssertionError("went on without the other process")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    modes: dict[str, Callable[[], None]] = {
        "fail": fail,
        "fail-late": fail_late,
        "disagree": disagree,
        "die": die,
        "recipe": recipe,
        "recipe-killed": recipe_killed,
        "plan-once": plan_once,
        "warm-up": warm_up,
        "tensor-parallel": tensor_parallel,
        "reading": reading,
        "parted": parted,
        "without-scatter": without_scatter,
        "resume-ddp": lambda: resume("ddp"),
        "resume-fsdp": lambda: resume("fsdp-mixed"),
        "resume-elsewhere": resume_elsewhere,
        "latency": latency,
        "latency-sharded": latency_sharded,
    }
    with tempfile.TemporaryDirectory() as tempfile.tempdir:
        for mode in sys.argv[1:]:
            print(f"{mode} begins", file=sys.stderr)
            modes.get(mode, lambda mode=mode: compare(mode))()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    # What DDP and FSDP keep of a group keeps gloo's threads; one that lets go of a tensor while Python shuts down aborts it
    sys.stdout.flush()
    os._exit(0)
