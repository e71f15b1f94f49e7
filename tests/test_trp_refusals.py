"""What TRP refuses, saying why."""

import pytest
import torch
from torch import nn

import rankprune as rp
from small_loop import network, sgd

BAD = {
    "every=0": {"every": 0},
    "every=2.5": {"every": 2.5},
    "nuclear=-0.1": {"nuclear": -0.1},
    "nuclear=nan": {"nuclear": float("nan")},
    "nuclear_cadence='epoch'": {"nuclear_cadence": "epoch"},
    "ramp=-1": {"ramp": -1},
    "freeze=3": {"ramp": 5, "freeze": 3},
    "FixedRank": {"rule": rp.FixedRank(2), "ramp": 5},
    "SingularValue": {"rule": rp.SingularValue(0.1), "ramp": 5},
    "RankFraction": {"rule": rp.RankFraction(0.5), "ramp": 5},
    "example": {"rule": rp.Budget(macs=0.5)},
    "'low'": {"rule": "low"},
    "'diagonal'": {"scheme": "diagonal"},
    "'layer9": {"exclude": ["layer9*"]},
}


@pytest.mark.parametrize(("named", "options"), BAD.items(), ids=BAD)
def test_bad_options_are_named(named: str, options: dict) -> None:
    with pytest.raises(rp.RankPruneError, match=named):
        rp.TRP(network(), **{"rule": rp.Energy(0.9), **options})


def test_model_without_a_layer_to_decompose() -> None:
    with pytest.raises(rp.RankPruneError, match="include"):
        rp.TRP(nn.Sequential(nn.LayerNorm(4), nn.ReLU()), rule=rp.Energy(0.9))


def test_optimizer_of_another_model() -> None:
    model = network()
    trp = rp.TRP(model, rule=rp.Energy(0.9))
    with pytest.raises(rp.RankPruneError, match=r"2, 4, 6.*model\.parameters\(\)"):
        trp.attach(sgd(network()))
    with pytest.raises(rp.RankPruneError, match=r"1 of 3 layers \(6\)"):
        trp.attach(torch.optim.SGD([p for n, p in model.named_parameters() if n != "6.weight"], lr=0.1))
    trp.attach(sgd(model))  # neither failure has left it attached


def test_attached_twice() -> None:
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.Energy(0.9)).attach(optimizer)
    for again in (trp, rp.TRP(model, rule=rp.Energy(0.9))):
        with pytest.raises(rp.RankPruneError, match=r"detach\(\)"):
            again.attach(optimizer)
    with pytest.raises(rp.RankPruneError, match=r"detach\(\)"):
        trp.attach(sgd(model))
    with pytest.raises(rp.RankPruneError, match=r"1 of these layers, too \(4\).*exclude="):
        rp.TRP(model, rule=rp.Energy(0.9), include=["4"]).attach(optimizer)
    trp.detach()
    rp.TRP(model, rule=rp.Energy(0.9)).attach(optimizer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(value: float) -> None:
    model = network()
    trp = rp.TRP(model, rule=rp.Energy(0.9))
    model[6].weight.data[3, 4] = value
    with pytest.raises(rp.FactorizationError, match="'6'"):
        trp.project()
