"""Budgets of latency in several processes, for distributed_worker.py."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import own_clock
import rankprune as rp
from distributed_setup import BATCH, EVERY, batches, network, train
from rankprune.latency import meter


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
    return rp.TRP(model, scheme="auto", rule=rule, every=EVERY, ramp=EVERY, example_inputs=x)


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
            half_known.load_state_dict({**half_known.state_dict(), "latency": trp.state_dict()["latency"]})
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
