import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import rankprune as rp
from rankprune.iteration import LowRankIteration
from rankprune.optimizer_step import add_to_gradients
from rankprune.stopwatch import Stopwatch


def test_overhead_is_inside_by_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    watch = Stopwatch()
    assert watch.overhead == 0
    for _ in range(3):
        with watch.running(torch.device("cpu")):
            now += 1
        now += 4
    assert watch.inside == 3
    assert watch.overhead == 3 / 8  # what follows the last exit does not count


def test_a_device_that_computes_asynchronously_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    with Stopwatch().running(torch.device("cpu")), Stopwatch().running():
        pass
    assert waited == []
    with Stopwatch().running(torch.device("cuda", 1)):
        assert waited == [torch.device("cuda", 1)]
    assert waited == [torch.device("cuda", 1)] * 2


def test_what_a_trp_adds_and_what_to_log() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    x = torch.randn(8, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trp = rp.TRP(model, rule=rp.Budget(macs=0.6), every=2, nuclear=1e-3, example_inputs=x)
    assert trp.metrics() == {"rankprune/overhead": 0.0}
    trp.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        time.sleep(0.02)
        optimizer.step()
    metrics = trp.metrics()
    assert 0 < trp.overhead == metrics["rankprune/overhead"]
    assert trp.plan is not None
    assert metrics["rankprune/macs"] == trp.plan.macs / trp.plan.macs_dense <= 0.6
    assert metrics["rankprune/params"] == trp.plan.params / trp.plan.params_dense < 1
    ranks = {name: rank for name, rank in metrics.items() if name.startswith("rankprune/rank/")}
    assert ranks == {f"rankprune/rank/{name}": rank for name, rank in trp.plan.ranks.items()} != {}
    trp.detach()
    again = trp.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert again.overhead == 0, "counted since attach"


@pytest.mark.parametrize("closure", [False, True])
def test_all_that_a_trp_does_is_overhead(closure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def taking(seconds: float, work: Callable) -> Callable:
        def done(*args: Any) -> Any:
            nonlocal now
            now += seconds
            return work(*args)

        return done

    monkeypatch.setattr("rankprune.stopwatch.time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(LowRankIteration, "project", taking(1, LowRankIteration.project))
    monkeypatch.setattr(LowRankIteration, "find_subgradients", taking(10, LowRankIteration.find_subgradients))
    monkeypatch.setattr("rankprune.trp.add_to_gradients", taking(100, add_to_gradients))
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trp = rp.TRP(model, rule=rp.FixedRank(4), every=2, nuclear=1e-3).attach(optimizer)

    def loss() -> torch.Tensor:
        nonlocal now
        now += 1000
        found = model(torch.ones(8, 16)).square().mean()
        found.backward()
        return found

    for _ in range(5):
        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
    ours = 2 * 1 + 10 + 5 * 100  # two projections, the first sub-gradients, five terms
    assert trp.overhead == ours / (1000 * (5 if closure else 4))  # what comes before the first step is not seen
