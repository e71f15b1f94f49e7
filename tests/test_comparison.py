"""Networks against each other by the clock, and one layer over its ranks."""

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from own_clock import MS_PER_LAYER, MS_PER_PARAMETER, budget, network
from rankprune.comparison import compare, layer_curve

pytestmark = pytest.mark.usefixtures("cache_by_own_clock")


def test_a_backend_that_cannot_take_a_network_is_told_of() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    found = compare({"dense": Branching()}, torch.ones(2, 2), ["eager", "onnxruntime"], rounds=3)
    assert [t.backend for t in found.timings] == ["eager"]
    assert "Branching" in found.failed["onnxruntime"]


def test_a_layers_curve_over_its_ranks() -> None:
    model, x = network()
    points = layer_curve(model, x, "5", "timeless", scheme="spatial", count=6)
    assert [p.rank for p in points] == [8, 16, 32, 48, 64, 80, 96]
    assert [p.macs for p in points] == pytest.approx([p.rank / 48 for p in points])
    dense = MS_PER_PARAMETER * (32 * 32 * 9 + 32) + MS_PER_LAYER
    expected = [(MS_PER_PARAMETER * (2 * 96 * p.rank + 32) + 2 * MS_PER_LAYER) / dense for p in points]
    assert [p.ms for p in points] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(rp.RankPruneError, match="no layer 'nothing'"):
        layer_curve(model, x, "nothing", "timeless")


def test_networks_in_training_are_timed_in_eval_mode_and_left_as_they_are() -> None:
    model, x = network()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compare({"dense": model}, x, ["eager"], rounds=3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_under_two_names_is_replaced_under_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one = nn.Linear(8, 64), nn.Linear(64, 64)
            self.other, self.last = self.one, nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.other(self.one(self.first(x)).relu()))

    model, x = Shared(), torch.randn(4, 8)
    plan = rp.make_plan(model, x, rule=budget(0.8))
    found = {t.network: t.ms for t in compare({"small": rp.decompose(model, plan)}, x, ["timeless"], rounds=3).timings}
    assert found["small"] == pytest.approx(plan.ms, rel=1e-4)
