"""What TRP carries along: a training that goes on from a state."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import rankprune as rp
from rankprune.iteration import STATE
from rankprune.spectrum import Spectrum
from small_loop import X, exactly_same, network, relative_macs, sgd, train


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SETTINGS = {
    "budget": {"rule": rp.Budget(macs=0.5), "scheme": "auto", "every": 3, "ramp": 6, "freeze": 8, "example_inputs": X},
    "energy": {"rule": rp.Energy(0.8), "scheme": "channel", "every": 3},
    "cadence": {"rule": rp.Energy(0.8), "scheme": "spatial", "every": 3, "nuclear_cadence": "projection"},
}


@pytest.mark.parametrize("stop", [2, 7, 9], ids=["before the first projection", "between", "after a projection"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_resumed_is_uninterrupted(settings: dict, stop: int) -> None:
    def start(seed: int) -> tuple[nn.Module, torch.optim.SGD, rp.TRP]:
        model = network(seed)
        optimizer = sgd(model)
        return model, optimizer, rp.TRP(model, nuclear=3e-3, **settings).attach(optimizer)

    whole, optimizer, trp = start(0)
    train(whole, optimizer, range(14))

    part, optimizer2, trp2 = start(0)
    train(part, optimizer2, range(stop))
    states = through_a_file({"m": part.state_dict(), "o": optimizer2.state_dict(), "t": trp2.state_dict()})

    resumed, optimizer3, trp3 = start(1)
    resumed.load_state_dict(states["m"])
    optimizer3.load_state_dict(states["o"])
    trp3.load_state_dict(states["t"])
    assert (trp3.steps, trp3.plan, trp3.history) == (stop, trp2.plan, trp2.history)
    train(resumed, optimizer3, range(stop, 14))

    exactly_same(resumed, whole)
    for p, q in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(optimizer3.state[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"])
    assert (trp3.steps, trp3.plan, trp3.history) == (trp.steps, trp.plan, trp.history)
    exactly_same(trp3.finalize(), trp.finalize())


def test_large_layers_go_on_from_their_last_vectors() -> None:
    def start(seed: int) -> tuple[nn.Module, torch.optim.SGD, rp.TRP]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return model, optimizer, rp.TRP(model, rule=rp.FixedRank(20), every=2).attach(optimizer)

    def go_on(model: nn.Module, optimizer: torch.optim.SGD, steps: range) -> None:
        for step in steps:
            x = torch.randn(8, 300, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    whole, optimizer, trp = start(0)
    go_on(whole, optimizer, range(3))
    states = through_a_file({"m": whole.state_dict(), "o": optimizer.state_dict(), "t": trp.state_dict()})
    assert states["t"]["starts"]["0", "linear"].shape == (1, 300, 20)
    go_on(whole, optimizer, range(3, 6))
    resumed, optimizer2, trp2 = start(1)
    resumed.load_state_dict(states["m"])
    optimizer2.load_state_dict(states["o"])
    trp2.load_state_dict(states["t"])
    go_on(resumed, optimizer2, range(3, 6))
    exactly_same(resumed, whole)


def test_a_state_is_not_changed_by_going_on() -> None:
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=1, nuclear=1e-2).attach(optimizer)
    train(model, optimizer, range(2))
    state = trp.state_dict()
    before = copy.deepcopy(state)
    train(model, optimizer, range(2, 4))
    terms, terms_before = state.pop("subgradients"), before.pop("subgradients")
    assert state == before
    assert all(torch.equal(terms[name], term) for name, term in terms_before.items())


@pytest.mark.parametrize("nuclear", [0.0, 1e-2])
@pytest.mark.parametrize("kind", ["other names", "other shapes"])
def test_state_of_another_model(kind: str, nuclear: float) -> None:
    other = nn.Sequential(network()) if kind == "other names" else network(width=24)
    theirs = rp.TRP(other, rule=rp.Energy(0.8), nuclear=nuclear)
    theirs.project()
    trp = rp.TRP(network(), rule=rp.Energy(0.8), nuclear=nuclear)
    assert trp.state_dict().keys() == {"steps", *STATE}
    for nothing in (None, {}, {"steps": 3}):
        with pytest.raises(rp.RankPruneError, match="no state of a TRP"):
            trp.load_state_dict(nothing)
    with pytest.raises(rp.RankPruneError, match="another model"):
        trp.load_state_dict(theirs.state_dict())


def test_a_state_that_cannot_be_read_changes_nothing() -> None:
    trp = rp.TRP(network(), rule=rp.Energy(0.7))
    trp.project()
    state = trp.state_dict()
    state["plan"] = state["plan"].replace('"format": 1', '"format": 2')
    fresh = rp.TRP(network(), rule=rp.Energy(0.7))
    before = fresh.state_dict()
    with pytest.raises(rp.CheckpointError, match="format 1"):
        fresh.load_state_dict(state)
    assert fresh.state_dict() == before


def test_detached_and_attached_again_goes_on() -> None:
    whole, model = network(), network()
    optimizer = sgd(whole)
    trp = rp.TRP(whole, rule=rp.Energy(0.8), every=3, nuclear=1e-2).attach(optimizer)
    train(whole, optimizer, range(10))
    optimizer2 = sgd(model)
    trp2 = rp.TRP(model, rule=rp.Energy(0.8), every=3, nuclear=1e-2).attach(optimizer2)
    train(model, optimizer2, range(5))
    trp2.detach()
    trp2.attach(optimizer2)
    train(model, optimizer2, range(5, 10))
    exactly_same(model, whole)
    assert (trp2.steps, trp2.history, trp2.plan) == (10, trp.history, trp.plan)


def test_a_state_with_nuclear_terms_in_a_training_without() -> None:
    theirs = rp.TRP(network(), rule=rp.Energy(0.8), nuclear=1e-2)
    theirs.project()
    model, plain = network(), network()
    optimizer, other = sgd(model), sgd(plain)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=3)
    trp.load_state_dict(theirs.state_dict())
    trp.attach(optimizer)
    train(model, optimizer, range(2))
    train(plain, other, range(2))
    exactly_same(model, plain)
    train(model, optimizer, range(2, 3))
    assert trp.history[-1][0] == 3
    assert not trp.state_dict()["subgradients"]


def test_terms_that_a_state_lacks_are_found_anew() -> None:
    """As those of sharded weights."""
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=3, nuclear=3e-3).attach(optimizer)
    train(model, optimizer, range(4))
    state = trp.state_dict()
    state["subgradients"] = {}
    trp.load_state_dict(state)
    train(model, optimizer, range(4, 5))
    assert trp.state_dict()["subgradients"].keys() == state["layers"].keys()


@pytest.mark.parametrize("changed", [{"rule": rp.Budget(macs=0.3)}, {"round_to": 3}], ids=["rule", "round_to"])
@pytest.mark.parametrize("more", [0, 3], ids=["finalized", "trained on"])
def test_ranks_are_chosen_anew_where_the_rule_changed(changed: dict, more: int) -> None:
    settings = {"rule": rp.Budget(macs=0.6), "scheme": "spatial", "every": 3, "freeze": 3, "example_inputs": X}
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, **settings).attach(optimizer)
    train(model, optimizer, range(6))
    trp.detach()
    state = trp.state_dict()
    other = rp.TRP(model, **settings | changed)
    with pytest.warns(UserWarning, match=r"a training with Budget\(macs=0.6\), round_to=1; from the next projection"):
        other.load_state_dict(state)
    other.attach(optimizer)
    train(model, optimizer, range(6, 6 + more))
    with nullcontext() if more else pytest.warns(UserWarning, match="before a projection by .* in full"):
        other.finalize()
    assert other.plan is not None
    assert other.plan.ranks != trp.plan.ranks
    assert other.plan.rule == repr(changed.get("rule", settings["rule"]))
    assert all(rank % changed.get("round_to", 1) == 0 for rank in other.plan.ranks.values())


def test_finalize_after_resuming_does_not_prune_twice() -> None:
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=4).attach(optimizer)
    train(model, optimizer, range(8))
    resumed = rp.TRP(model, rule=rp.Energy(0.8), every=4)
    resumed.load_state_dict(trp.state_dict())
    resumed.finalize()
    assert (resumed.plan, resumed.history) == (trp.plan, trp.history)


def test_after_a_finalize_in_the_ramp_the_ramp_goes_on_also_resumed() -> None:
    def fresh() -> rp.TRP:
        return rp.TRP(network(), rule=rp.Budget(macs=0.5), scheme="channel", every=2, ramp=100, example_inputs=X)

    trp, resumed = fresh(), fresh()
    optimizer = sgd(trp.model)
    trp.attach(optimizer)
    train(trp.model, optimizer, range(5))
    with pytest.warns(UserWarning, match="before the ramp did"):
        trp.finalize()
    settings = trp.settings
    in_full = relative_macs(trp.plan)
    resumed.model.load_state_dict(trp.model.state_dict())
    other = sgd(resumed.model)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(through_a_file(trp.state_dict()))
    for t, o in ((trp, optimizer), (resumed, other)):
        t.attach(o)
        train(t.model, o, range(5, 10))
    exactly_same(trp.model, resumed.model)
    assert trp.plan == resumed.plan
    assert relative_macs(trp.plan) > 1.2 * in_full
    assert trp.settings == settings
    assert settings["ramp"] == 100


class Half(rp.rules.LocalRule):
    """A rule of one's own, without a repr."""

    def rank_of(self, spectrum: Spectrum) -> int:
        return spectrum.full_rank // 2


def test_a_rule_of_ones_own_is_the_same_one_after_resuming() -> None:
    states = [rp.TRP(network(), rule=rule, every=3).state_dict() for rule in (Half(), rp.Energy(0.5))]
    trp = rp.TRP(network(), rule=Half(), every=3)
    trp.load_state_dict(states[0])
    with pytest.warns(UserWarning, match=r"a training with Energy\(keep=0.5\), .* chosen by .*Half object>, "):
        trp.load_state_dict(states[1])


def test_ranks_that_stay_are_in_a_state_once() -> None:
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.FixedRank(3), every=1).attach(optimizer)
    train(model, optimizer, range(4))
    trp.detach()
    state = trp.state_dict()
    assert state["history"] == [(1, trp.plan.ranks), (2, {}), (3, {}), (4, {})]
    other = rp.TRP(model, rule=rp.FixedRank(3), every=1)
    other.load_state_dict(through_a_file(state))
    assert other.history == trp.history
    assert other.history[0][1] is other.history[3][1]


def test_of_ranks_that_move_a_state_has_the_changes() -> None:
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.Energy(0.9), every=1).attach(optimizer)
    train(model, optimizer, range(3))
    trp._iteration.history += [(4, {"2": 3}), (5, {"2": 3, "6": 1}), (6, {})]
    changes = trp.state_dict()["history"]
    assert changes[-2:] == [(5, {"6": 1}), (6, {"2": None, "6": None})]
    other = rp.TRP(model, rule=rp.Energy(0.9), every=1)
    other.load_state_dict(through_a_file(trp.state_dict()))
    assert other.history == trp.history


def test_a_rule_that_tells_an_address_is_the_same_one_after_resuming(recwarn: pytest.WarningsRecorder) -> None:
    class Told(rp.FixedRank):
        def __repr__(self) -> str:
            return f"Told({object()})"

    state = rp.TRP(network(), rule=Told(3), every=3).state_dict()
    rp.TRP(network(), rule=Told(3), every=3).load_state_dict(state)
    assert not recwarn.list
