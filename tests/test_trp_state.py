"""What TRP carries along: resuming, annealing and freezing the ranks, and the last projection."""

import copy
import io
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankprune as rp
from rankprune.schemes import SCHEMES

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(9))


def network(seed: int = 0, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, width, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(width, 16, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(144, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    )


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    model.train()
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 3, 6, 6, generator=generator), torch.randint(5, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def exactly_same(a: nn.Module, b: nn.Module) -> None:
    different = [n for (n, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True) if not x.equal(y)]
    assert not different


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
    with pytest.raises(rp.RankPruneError, match="another model"):
        trp.load_state_dict(theirs.state_dict())


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


@pytest.mark.parametrize("leave", ["detach", "finalize"])
def test_no_hook_is_left(leave: str) -> None:
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=1, nuclear=1e-2).attach(optimizer)
    train(model, optimizer, range(2))
    getattr(trp, leave)()
    plain = copy.deepcopy(model)
    optimizer2 = sgd(plain)
    optimizer2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (plain, optimizer2)):
        train(m, o, range(2, 5))
    exactly_same(model, plain)
    assert trp.steps == 2
    trp.detach()  # a second time does nothing
    rp.TRP(model, rule=rp.Energy(0.8)).attach(optimizer)


@pytest.mark.parametrize("scheme", [*(name for name in SCHEMES if name != "linear"), "auto"])
def test_finalize_computes_what_the_projected_network_does(scheme: str) -> None:
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, scheme=scheme, rule=rp.Energy(0.8), every=4, example_inputs=X).attach(optimizer)
    train(model, optimizer, range(10))
    small = trp.finalize()
    assert trp.history[-1] == (10, trp.plan.ranks)
    assert trp.plan.ranks.keys() >= {"2", "6"}
    assert (small.eval()(X) - model.eval()(X)).abs().max() < 1e-4
    assert all(len(small.get_submodule(name)) == 2 for name in trp.plan.ranks)
    assert small[6][0].out_features == trp.plan.ranks["6"]
    assert rp.count(small, X).macs == trp.plan.macs < trp.plan.macs_dense
    assert rp.count(small, X).params == trp.plan.params


def test_finalize_does_not_prune_twice() -> None:
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=4).attach(optimizer)
    train(model, optimizer, range(8))
    plan, weights = trp.plan, copy.deepcopy(model)
    trp.finalize()
    assert trp.plan == plan
    assert [step for step, _ in trp.history] == [4, 8]
    for (name, ours), theirs in zip(model.named_parameters(), weights.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7), name


def test_finalize_sees_weights_exchanged_through_data() -> None:  # as an average of weights is put in place
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=4).attach(optimizer)
    train(model, optimizer, range(8))
    for parameter in model.parameters():
        parameter.data.copy_(parameter + 0.01 * torch.randn_like(parameter))
    small = trp.finalize()
    assert (small.eval()(X) - model.eval()(X)).abs().max() < 1e-4


def test_finalize_after_resuming_does_not_prune_twice() -> None:
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=4).attach(optimizer)
    train(model, optimizer, range(8))
    resumed = rp.TRP(model, rule=rp.Energy(0.8), every=4)
    resumed.load_state_dict(trp.state_dict())
    resumed.finalize()
    assert (resumed.plan, resumed.history) == (trp.plan, trp.history)


def test_finalize_without_a_step() -> None:
    model = network()
    trp = rp.TRP(model, rule=rp.FixedRank(3))
    small = trp.finalize()
    assert trp.plan.ranks == {"2": 3, "4": 3, "6": 3}
    assert (small.eval()(X) - model.eval()(X)).abs().max() < 1e-4


def plans_over_training(trp: rp.TRP, model: nn.Module, steps: int) -> list[rp.Plan]:
    optimizer = sgd(model)
    trp.attach(optimizer)
    plans = []
    for step in range(steps):
        train(model, optimizer, [step])
        plans.append(trp.plan)
    return plans


def relative_macs(plan: rp.Plan) -> float:
    return plan.macs / plan.macs_dense


def test_budget_ramps_down_to_its_target() -> None:
    model = network()
    trp = rp.TRP(model, rule=rp.Budget(macs=0.5), scheme="channel", every=1, ramp=8, example_inputs=X)
    macs = [relative_macs(plan) for plan in plans_over_training(trp, model, 12)]
    allowed = [1 - 0.5 * (1 - (1 - min(step / 8, 1)) ** 3) for step in range(1, 13)]
    assert all(0.9 * a < m <= a for m, a in zip(macs, allowed, strict=True))
    assert macs == sorted(macs, reverse=True)
    assert macs[-1] > 0.48


def test_energy_ramps_down_to_its_target() -> None:
    model, plain = network(), network()
    trp = rp.TRP(model, rule=rp.Energy(0.5), scheme="channel", every=1, ramp=8, example_inputs=X)
    macs = [relative_macs(plan) for plan in plans_over_training(trp, model, 8)]
    abrupt = rp.make_plan(plain, X, rule=rp.Energy(0.5), scheme="channel")
    assert macs[0] > macs[2] > macs[-1]
    assert macs[0] > 1.3 * relative_macs(abrupt)
    assert trp.plan.rule == "Energy(keep=0.5)"


@pytest.mark.parametrize("rule", [rp.Budget(macs=0.5), rp.Energy(0.5)])
def test_finalize_in_the_ramp_applies_the_rule_in_full(rule: rp.Budget | rp.Energy) -> None:
    model = network()
    trp = rp.TRP(model, rule=rule, scheme="channel", every=2, ramp=100, example_inputs=X)
    before = plans_over_training(trp, model, 4)[-1]
    weights = copy.deepcopy(model)
    trp.finalize()
    assert trp.plan == rp.make_plan(weights, X, rule=rule, scheme="channel")
    assert trp.plan.macs < before.macs


def test_after_a_finalize_in_the_ramp_the_ramp_goes_on_also_resumed() -> None:
    def fresh() -> rp.TRP:
        return rp.TRP(network(), rule=rp.Budget(macs=0.5), scheme="channel", every=2, ramp=100, example_inputs=X)

    trp, resumed = fresh(), fresh()
    optimizer = sgd(trp.model)
    trp.attach(optimizer)
    train(trp.model, optimizer, range(5))
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


def test_frozen_ranks_are_constant_and_weights_keep_to_them() -> None:
    model = network()
    trp = rp.TRP(model, rule=rp.Energy(0.8), scheme="channel", every=2, freeze=6)
    free = rp.TRP(network(), rule=rp.Energy(0.8), scheme="channel", every=2)
    for t in (trp, free):
        plans_over_training(t, t.model, 40)
    assert [step for step, _ in trp.history] == list(range(2, 41, 2))
    frozen = [ranks for step, ranks in trp.history if step >= 6]
    assert all(ranks == frozen[0] for ranks in frozen)
    assert free.history[-1][1] != frozen[0]  # left alone, they would have moved
    rank = torch.linalg.matrix_rank(model[6].weight.detach(), rtol=1e-5)
    assert rank == frozen[0]["6"]


def test_ranks_do_not_freeze_before_the_rule_has_applied_in_full() -> None:
    model = network()
    trp = rp.TRP(model, rule=rp.Budget(macs=0.5), every=6, ramp=10, freeze=10, example_inputs=X)
    plans = plans_over_training(trp, model, 14)  # projections at 6, in the ramp, and at 12, after it
    assert relative_macs(plans[-1]) <= 0.5
    trp.finalize()
    assert relative_macs(trp.plan) <= 0.5


def test_freezing_before_the_first_projection_still_chooses_once() -> None:
    model = network()
    trp = rp.TRP(model, rule=rp.FixedRank(3), every=4, freeze=1)
    assert plans_over_training(trp, model, 5)[-1].ranks == {"2": 3, "4": 3, "6": 3}


def test_the_finalized_copy_trains_apart_from_the_model() -> None:
    model = network()
    trp = rp.TRP(model, rule=rp.FixedRank(3))
    small = trp.finalize()
    assert isinstance(model[6], nn.Linear)
    logits: Tensor = small(X)
    logits.sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_two_on_one_optimizer_with_layers_of_their_own() -> None:
    whole, parts = network(), network()
    settings = {"rule": rp.Energy(0.8), "scheme": "channel", "every": 3, "nuclear": 1e-2}
    first, second = sgd(whole), sgd(parts)
    alone = rp.TRP(whole, **settings).attach(first)
    a = rp.TRP(parts, include=["2"], **settings).attach(second)
    b = rp.TRP(parts, exclude=["2"], **settings).attach(second)
    train(whole, first, range(10))
    train(parts, second, range(10))
    exactly_same(parts, whole)
    a.finalize()
    b.finalize()
    assert a.plan is not None
    assert b.plan is not None
    both, small = a.plan | b.plan, alone.finalize()
    assert alone.plan is not None
    assert (both.ranks, both.params) == (alone.plan.ranks, alone.plan.params)
    exactly_same(rp.decompose(parts, both), small)
    with pytest.raises(rp.RankPruneError, match="both plans give"):
        a.plan | alone.plan


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
    other.finalize()
    assert other.plan is not None
    assert other.plan.ranks != trp.plan.ranks
    assert other.plan.rule == repr(changed.get("rule", settings["rule"]))
    assert all(rank % changed.get("round_to", 1) == 0 for rank in other.plan.ranks.values())


def test_terms_that_a_state_lacks_are_found_anew() -> None:
    """As those of sharded weights, beside others that are whole."""
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=3, nuclear=3e-3).attach(optimizer)
    train(model, optimizer, range(4))
    state = trp.state_dict()
    state["subgradients"].popitem()
    trp.load_state_dict(state)
    train(model, optimizer, range(4, 5))
    assert trp.state_dict()["subgradients"].keys() == state["layers"].keys()
