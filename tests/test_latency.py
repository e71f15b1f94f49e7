"""What the times of layers say of the network."""

import random

import pytest
import torch
from torch import Tensor, nn

import own_clock
import rankprune as rp
from own_clock import budget, network
from rankprune.backends import Program
from rankprune.comparison import compare
from rankprune.inputs import Inputs
from rankprune.latency import meter

pytestmark = pytest.mark.usefixtures("cache_by_own_clock")


def test_the_latency_asked_for_is_had() -> None:
    model, x = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = rp.make_plan(model, x, rule=budget(0.6))
    assert plan.ms is not None
    assert plan.ms_dense is not None
    assert plan.ms <= 0.6 * plan.ms_dense
    assert plan.ms_measured == pytest.approx(plan.ms, rel=1e-4)
    assert "1" in plan.skipped  # 32 x 8, which takes longer in two layers
    small = rp.decompose(model, plan)
    found = {t.network: t.ms for t in compare({"dense": model, "small": small}, x, ["timeless"], rounds=9).timings}
    assert found["dense"] / found["small"] == pytest.approx(1 / 0.6, rel=0.1)
    assert found["small"] == pytest.approx(plan.ms, rel=1e-4)
    threads = torch.get_num_threads()
    told = f"predicted, measured {plan.ms_measured:.2f}; timeless, {threads} thread{'s' if threads > 1 else ''}, 2 x 3 x 4 x 4)"
    assert str(plan).splitlines()[-1].endswith(told)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert rp.Plan.from_json(plan.to_json()) == plan


class Costly(own_clock.Timeless):
    """Each layer of a whole network beyond five takes so many milliseconds more, which no layer shows by itself."""

    def __init__(self, ms: float) -> None:
        super().__init__()
        self.ms = ms

    def _load(self, model: nn.Module, x: Inputs) -> Program:
        program = super()._load(model, x)
        layers = sum(isinstance(m, nn.Linear) for m in model.modules())
        program.ms += self.ms * max(0, layers - 5)  # type: ignore[attr-defined]
        return program


def five_layers() -> tuple[nn.Module, Tensor]:
    """87 ms by our clock, of which three layers can save 26 each."""
    torch.manual_seed(0)
    middle = [m for _ in range(3) for m in (nn.Linear(256, 256), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), *middle, nn.Linear(256, 4)), torch.randn(4, 64)


@pytest.mark.parametrize("fraction", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("ms", [2.0, 8.0])
def test_what_pairs_cost_in_the_network_only_is_found(monkeypatch: pytest.MonkeyPatch, ms: float, fraction: float) -> None:
    own_clock.add(monkeypatch, Costly(ms))
    model, x = five_layers()
    plan = rp.make_plan(model, x, rule=budget(fraction))
    found = Costly(ms).load(rp.decompose(model, plan), x).ms  # type: ignore[attr-defined]
    assert found <= 1.001 * fraction * plan.ms_dense
    assert plan.ms == pytest.approx(found, rel=0.01)
    assert plan.ms_measured == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_chosen_has_been_timed_also_where_noise_lets_nothing_settle(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    noise = random.Random(seed)

    def noisy(programs: list[Program], x: Inputs) -> list[list[float]]:
        return [[values[0] * noise.uniform(0.9, 1.1)] * 15 for values in own_clock.clock(programs, x)]

    monkeypatch.setattr(meter, "time_together", noisy)
    monkeypatch.setattr(own_clock.Timeless, "ranks", 64)
    model, x = five_layers()
    plan = rp.make_plan(model, x, rule=budget(0.75))
    assert plan.ms is not None
    assert plan.ms <= 0.75 * (plan.ms_dense or 0)
    assert plan.ms_measured == pytest.approx(plan.ms, rel=0.25)


def test_layers_that_gain_nothing_in_the_network_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    own_clock.add(monkeypatch, Costly(60.0))
    model, x = five_layers()
    assert not rp.make_plan(model, x, rule=budget(1.0)).ranks
    with pytest.raises(
        rp.RankPruneError, match=r"cannot be met: with every layer at its least rank 1\.000 of the latency remain"
    ):
        rp.make_plan(model, x, rule=budget(0.95))


def test_a_real_backend_from_measuring_to_training(monkeypatch: pytest.MonkeyPatch) -> None:
    own_clock.add(monkeypatch, own_clock.TimedEager())

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4))

    def trainer(model: nn.Module) -> tuple[rp.TRP, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return rp.TRP(model, rule=rp.Budget(latency=0.6), every=2, ramp=4, example_inputs=x).attach(optimizer), optimizer

    x, model = torch.randn(256, 512), build()
    trp, optimizer = trainer(model)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    small = trp.finalize()
    torch.testing.assert_close(small(x), model(x), rtol=1e-3, atol=1e-4)
    assert trp.plan is not None
    assert trp.plan.ms is not None
    assert trp.plan.ms_dense is not None
    assert trp.plan.ms <= 0.6 * trp.plan.ms_dense
