"""What each process of a torchrun does in test_distributed.py: train under TRP together, and compare with one process alone.

torchrun --standalone --nproc-per-node=2 distributed_worker.py MODE
"""

import copy
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import own_clock
import rankprune as rp
from rankprune import linalg
from rankprune.distributed import reshard
from rankprune.latency import meter
from rankprune.schemes import SCHEMES

STEPS, EVERY, BATCH = 7, 3, 8


def network() -> nn.Module:
    """Convolutions, and a Linear large enough for a factorisation to start from the last one."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(24 * 16, 300), nn.ReLU(), nn.Linear(300, 5))
    return nn.Sequential(stem, head)


def batches() -> list[tuple[Tensor, Tensor]]:
    """The same for all processes, each with a multiple of as many images as there are processes."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, 3, 8, 8, generator=generator), torch.randint(5, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def train(model: nn.Module, trp: rp.TRP, rank: int, size: int, before_step: Callable[[int], None] = lambda step: None) -> None:
    """Each of `size` processes takes its part of every batch."""
    optimizer = sgd(model)
    trp.attach(optimizer)
    go_on(model, optimizer, rank, size, range(STEPS), before_step)


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The optimizer that all modes use."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def go_on(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    size: int,
    steps: Iterable[int],
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Take these steps."""
    for step in steps:
        x, y = batches()[step]
        loss = F.cross_entropy(model(x.chunk(size)[rank]), y.chunk(size)[rank])
        optimizer.zero_grad()
        loss.backward()
        before_step(step)
        optimizer.step()


def make(model: nn.Module, group: dist.ProcessGroup | None = None, **changed: Any) -> rp.TRP:
    """The TRP that all modes use."""
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    settings: dict[str, Any] = {"rule": rp.Budget(macs=0.3), "every": EVERY, "nuclear": 1e-2, "ramp": 2 * EVERY}
    return rp.TRP(model, **(settings | changed), example_inputs=x, process_group=group)


def together(mode: str) -> tuple[nn.Module, nn.Module]:
    """The network and what is trained of it: itself, sharded as `mode` says, or wrapped by DDP."""
    model = network()
    if mode == "ddp":
        return model, nn.parallel.DistributedDataParallel(model)
    blocks = {"fsdp-root": [], "fsdp-mixed": [model[1]]}.get(mode, list(model))  # type: ignore[index]
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    return model, model


@torch.no_grad()
def evaluate(model: nn.Module) -> None:
    """A forward pass alone, after which FSDP2 leaves the root's weights whole."""
    model(batches()[0][0])


def whole(tensor: Tensor) -> Tensor:
    """A plain copy of a weight, sharded or not."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


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
    assert trp._planner.team.size == size
    owners = set(trp._planner.owner.values())
    assert owners == set(range(size)), f"the layers are shared out: {owners}"
    if mode != "ddp":
        with pytest.raises(rp.RankPruneError, match="into="):
            trp.finalize()
        assert trp.plan is not None
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
        assert (small(x) - trainee(x)).abs().max() < 1e-4 if mode == "ddp" else True
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
    return {name: whole(term) for name, term in trp._subgradients.items()}


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
            name = next(n for n, owner in trp._planner.owner.items() if owner == 1)
            if rank == 1:
                with torch.no_grad():
                    model.get_submodule(name).weight.fill_(float("nan"))

    with pytest.raises(rp.RankPruneError, match="NaN") as raised:
        train(model, trp, rank, size, damage)
    assert isinstance(raised.value, rp.FactorizationError) == (rank == 1)
    assert rank == 1 or "process 1 of 2" in str(raised.value)
    print(f"process {rank} was told", flush=True)


def timed_network() -> nn.Module:
    """Two layers of one size, and one of them of low rank, but for noise: what is chosen depends on the weights."""
    stem = network()[0]  # type: ignore[index]
    head = [nn.Flatten(), nn.Linear(384, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 5)]
    with torch.no_grad():
        head[3].get_parameter("weight").mul_(0.01).add_(0.02 * torch.randn(300, 4) @ torch.randn(4, 300))
    return nn.Sequential(stem, nn.Sequential(*head))


def latency_budget(model: nn.Module, fraction: float = 0.6) -> rp.TRP:
    """A TRP under a budget of latency, by our clock."""
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    rule = rp.Budget(latency=fraction, backend="timeless")
    return rp.TRP(model, rule=rule, every=EVERY, ramp=EVERY, example_inputs=x)


def agree(found: object) -> None:
    """Raise unless all processes found the same."""
    everyone: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    assert all(other == found for other in everyone), everyone


def latency() -> None:
    """One process measures, when attached and when the ramp is over, and all choose by that; its errors reach all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with pytest.MonkeyPatch.context() as patch:
        own_clock.add(patch, own_clock.Timeless(ms_per_square=(rank + 1) * 1e-10))  # every process has another clock
        timings = own_clock.count_timings(patch)
        model = timed_network()
        trp = latency_budget(model)
        assert timings == []
        train(nn.parallel.DistributedDataParallel(model), trp, rank, size)
        assert trp._planner.latency is not None
        assert len(timings) == (3 + 2 + 1 if rank == 0 else 0), timings
        assert trp.plan is not None
        agree(trp.plan)
        agree(trp._planner.latency.table)
        agree(trp.state_dict()["latency"])
        agree({name: weight.tolist() for name, weight in model.named_parameters()})

        half_known = latency_budget(model)
        if rank == 1:  # what the others know does not matter
            half_known.load_state_dict(trp.state_dict())
        half_known.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        assert half_known._planner.latency is not None
        agree(half_known._planner.latency.table)

        impossible, optimizer = latency_budget(model, 0.01), torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(rp.RankPruneError, match=r"cannot be met"):
            impossible.attach(optimizer)

        def broken(*args: object) -> list[list[float]]:
            raise rp.ExportError("no such operator")

        patch.setattr(meter, "time_together", broken)
        meter.LatencyCache._remembered.clear()
        patch.setenv("RANKPRUNE_CACHE", os.devnull)
        with pytest.raises(rp.RankPruneError, match="no such operator") as raised:
            latency_budget(model).attach(optimizer)
        assert isinstance(raised.value, rp.ExportError) == (rank == 0)
        assert rank == 0 or "process 0 of 2" in str(raised.value)
    print(f"process {rank} measured {len(timings)} times", flush=True)


def latency_sharded() -> None:
    """Sharded weights cannot be timed: that is told to all, and a state from before they were sharded goes on."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        own_clock.add(patch, own_clock.Timeless())
        timings = own_clock.count_timings(patch)
        meter.LatencyCache._remembered.clear()
        patch.setenv("RANKPRUNE_CACHE", os.devnull)
        model = timed_network()
        before = latency_budget(model)
        before.attach(torch.optim.SGD(model.parameters(), lr=0.1)).detach()
        assert (len(timings) > 0) == (rank == 0)
        for block in model:
            fully_shard(block)
        fully_shard(model)
        known = len(timings)
        with pytest.raises(rp.RankPruneError, match=r"attach a TRP with this rule before sharding"):
            latency_budget(model).attach(torch.optim.SGD(model.parameters(), lr=0.1))
        trp = latency_budget(model)
        trp.load_state_dict(before.state_dict())
        train(model, trp, rank, size)
        assert len(timings) == known
        told = [w for w in warned if "cannot be set right" in str(w.message)]
        assert len(told) == (1 if rank == 0 else 0)
        assert trp.plan is not None
        agree(trp.plan)
        small = trp.finalize(timed_network())
        assert trp.plan.ms is not None
        assert trp.plan.ms <= 0.6 * (trp.plan.ms_dense or 0)
        assert small(batches()[0][0]).shape == (BATCH, 5)


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
        "die": die,
        "without-scatter": without_scatter,
        "resume-ddp": lambda: resume("ddp"),
        "resume-fsdp": lambda: resume("fsdp-mixed"),
        "resume-elsewhere": resume_elsewhere,
        "latency": latency,
        "latency-sharded": latency_sharded,
    }
    for mode in sys.argv[1:]:
        print(f"{mode} begins", file=sys.stderr)
        modes.get(mode, lambda mode=mode: compare(mode))()
    dist.destroy_process_group()
