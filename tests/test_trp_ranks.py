"""The course of the ranks: annealed, kept, and the last projection."""

import copy

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from rankprune.schemes import SCHEMES
from small_loop import X, exactly_same, network, relative_macs, sgd, train


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


def test_finalize_without_a_step() -> None:
    model = network()
    trp = rp.TRP(model, rule=rp.FixedRank(3))
    trp.project()
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
    with pytest.warns(UserWarning, match="ended after 4 steps, before the ramp did at 100"):
        trp.finalize()
    assert trp.plan == rp.make_plan(weights, X, rule=rule, scheme="channel")
    assert trp.plan.macs < before.macs


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


def test_a_rule_that_fails_is_named() -> None:
    class Failing(rp.FixedRank):
        def choose(self, layers: object, network: object) -> dict:
            raise ValueError("no idea")

    with pytest.raises(rp.RankPruneError, match=r"Failing\(rank=2\) failed to choose: ValueError: no idea"):
        rp.TRP(network(), rule=Failing(2))


@pytest.mark.parametrize(
    ("said", "steps", "every", "ramp"),
    [
        ("no step of an optimizer", 0, 1, 0),
        ("before a projection by Energy", 2, 3, 0),
        ("before the ramp did", 4, 3, 5),
    ],
)
def test_finalize_warns_where_no_projection_was_by_the_rule_in_full(said: str, steps: int, every: int, ramp: int) -> None:
    model = network()
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=every, ramp=ramp)
    optimizer = sgd(model)
    trp.attach(optimizer)
    train(model, optimizer, range(steps))
    with pytest.warns(UserWarning, match=said):
        trp.finalize()


def test_finalize_warns_of_a_trp_that_was_never_attached() -> None:
    model = network()
    trp = rp.TRP(model, rule=rp.FixedRank(3))
    train(model, sgd(model), range(3))
    with pytest.warns(UserWarning, match="no step of an optimizer that it was attached to: finalize"):
        trp.finalize()
    trp.finalize()  # by now it has been told, and has projected


def test_ranks_that_fall_in_the_last_projection_are_no_reason_to_warn() -> None:
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=3).attach(optimizer)
    train(model, optimizer, range(6))
    (name, rank), *_ = trp.plan.ranks.items()
    with torch.no_grad():  # as if training had made the last one that is needed just dispensable
        weight = model.get_submodule(name).weight
        left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        values[rank - 1 :] = 0
        values[rank - 1] = 0.45 * values.norm()
        weight.copy_((left * values @ right).view_as(weight))
    trp.steps += 1
    trp.finalize()
    assert trp.plan.ranks[name] < rank


def test_finalize_warns_where_the_weights_were_trained_on_without_it() -> None:
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.FixedRank(3), every=2).attach(optimizer)
    train(model, optimizer, range(5))
    trp.finalize()  # a step after a projection, as any training may end
    other = torch.optim.Adam(model.parameters(), lr=0.05)
    train(model, other, range(20))
    with pytest.warns(UserWarning, match="changed without this TRP since"):
        trp.finalize()
    with torch.no_grad():
        model[6].weight.normal_()
    with pytest.warns(UserWarning, match="of layer '6'.*changed without this TRP since"):
        trp.finalize()


def test_a_rule_that_has_applied_in_full_is_annealed_no_more() -> None:
    def fresh(ramp: int) -> rp.TRP:
        return rp.TRP(network(), rule=rp.Budget(macs=0.5), every=2, ramp=ramp, freeze=ramp, example_inputs=X)

    short, extended = fresh(4), fresh(40)
    plans_over_training(short, short.model, 6)
    extended.model.load_state_dict(short.model.state_dict())
    extended.load_state_dict(short.state_dict())
    optimizer = sgd(extended.model)
    extended.attach(optimizer)
    train(extended.model, optimizer, range(6, 10))
    assert extended.steps == 10
    assert relative_macs(extended.plan) <= 0.5


def test_the_finalized_copy_trains_apart_from_the_model() -> None:
    model = network()
    trp = rp.TRP(model, rule=rp.FixedRank(3))
    trp.project()
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
