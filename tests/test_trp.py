"""TRP against a training loop written out by hand."""

import copy
import pickle
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from by_hand import CONSIDERED, SCHEMES, as_matrices, assert_same, batches, network, reference, sgd, train
from rankprune import linalg, schemes
from rankprune.planner import Planner
from rankprune.projection import project_factored


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("nuclear", "cadence"), [(0.0, "step"), (3e-3, "step"), (3e-3, "projection")])
def test_equals_a_loop_written_by_hand(scheme: str, nuclear: float, cadence: str) -> None:
    ours, theirs = network(), network()
    trp = rp.TRP(ours, scheme=scheme, rule=rp.Energy(0.8), every=3, nuclear=nuclear, nuclear_cadence=cadence)
    optimizer = sgd(ours)
    trp.attach(optimizer)
    train(ours, optimizer, 11)
    history = reference(theirs, 11, every=3, keep=0.8, scheme=scheme, nuclear=nuclear, cadence=cadence)
    assert_same(ours, theirs, rtol=1e-4, atol=2e-6)
    assert trp.history == history
    assert [step for step, _ in history] == [3, 6, 9]
    assert history[-1][1].keys() >= {"body", "hidden"}


def singular_values(layer: nn.Module) -> Tensor:
    return torch.linalg.svdvals(layer.weight.detach().flatten(1))


@pytest.mark.parametrize(
    ("cadence", "every", "terms"), [("step", 1, 10), ("step", 5, 10), ("step", 100, 10), ("projection", 5, 2)]
)
def test_nuclear_strength(cadence: str, every: int, terms: int) -> None:
    """With no other gradient each term lowers every singular value by lr * nuclear."""
    model = network()
    optimizer = sgd(model, momentum=0, weight_decay=0)
    trp = rp.TRP(model, scheme="channel", rule=rp.Energy(1.0), every=every, nuclear=1e-2, nuclear_cadence=cadence)
    trp.attach(optimizer)
    trp.project()
    before = {name: singular_values(model.get_submodule(name)) for name in CONSIDERED}
    for _ in range(10):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for name, values in before.items():
        after = singular_values(model.get_submodule(name))
        torch.testing.assert_close(values - after, torch.full_like(after, terms * 0.05 * 1e-2), rtol=1e-2, atol=1e-6)


def test_nuclear_term_empties_the_tail() -> None:
    def tail(nuclear: float) -> float:
        model = network()
        optimizer = sgd(model, momentum=0)
        rp.TRP(model, scheme="channel", rule=rp.Energy(1.0), every=2, nuclear=nuclear).attach(optimizer)
        train(model, optimizer, 80)
        energy = singular_values(model.body).square()
        return float(energy[4:].sum() / energy.sum())

    assert tail(0.1) < 0.7 * tail(0.0)


def test_only_planned_layers_change() -> None:
    model, plain = network(), network()
    ours, theirs = sgd(model), sgd(plain)
    trp = rp.TRP(model, scheme="channel", rule=rp.FixedRank(7), every=2, exclude=["body"]).attach(ours)
    train(model, ours, 2)
    train(plain, theirs, 2)
    assert trp.plan is not None
    assert trp.plan.ranks.keys() == {"hidden"}
    assert trp.plan.skipped.keys() == {"first", "body", "small", "head"}  # small: 7 > its break-even rank
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, plain.state_dict()[n])}
    assert changed == {"hidden.weight"}
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


def ranks_of(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    weights = {name: model.get_submodule(name).weight.detach().flatten(1) for name in names}
    return {name: int(torch.linalg.matrix_rank(weight, rtol=1e-5)) for name, weight in weights.items()}


@pytest.mark.parametrize("rule", [rp.Energy(0.93), rp.SingularValue(0.36)])
def test_layers_without_a_cheaper_pair_are_held_at_their_ranks(rule: rp.rules.RankRule) -> None:
    model, (x, _) = network(), next(iter(batches(1)))
    trp = rp.TRP(model, scheme="channel", rule=rule, freeze=0)
    plan = trp.project()
    assert plan.projected.keys() == set(CONSIDERED)
    held = plan.projected.keys() - plan.ranks.keys()
    assert held
    assert held <= plan.skipped.keys()
    assert ranks_of(model, plan.projected) == {name: entry.rank for name, entry in plan.projected.items()}
    assert all(0 < entry.error <= (0.07 if isinstance(rule, rp.Energy) else 1) for entry in plan.projected.values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    later = trp.project()
    assert later.choices == plan.choices, "ranks are kept from freeze on"
    assert all(entry.error != plan.projected[name].error for name, entry in later.projected.items()), "of these weights"
    assert rp.Plan.from_json(plan.to_json()) == plan
    small = trp.finalize()
    assert ranks_of(small, held) == {name: plan.projected[name].rank for name in held}
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rank_of_the_weights_is_the_plans_and_stays(scheme: str) -> None:
    model = network()
    trp = rp.TRP(model, scheme=scheme, rule=rp.Energy(0.7))
    plan = trp.project()
    assert plan.ranks.keys() >= {"body", "hidden"}
    for name, rank in plan.ranks.items():
        matrices = as_matrices(model.get_submodule(name).weight.detach(), scheme)
        assert set(torch.linalg.matrix_rank(matrices, rtol=1e-5).tolist()) == {rank}
    before = copy.deepcopy(model)
    rp.project(model, plan)
    assert_same(model, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fixed", [True, False])
def test_a_rank_beyond_the_known_vectors_has_the_layer_factored_whole(fixed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 10))
    model[0].weight.data = torch.randn(300, 40) @ torch.randn(40, 300) / 300 + 0.01 * torch.randn(300, 300)
    weight = model[0].weight.detach().clone()
    planner = Planner(model, scheme="channel", rule=rp.FixedRank(40))
    factorizer = planner.factorizer
    before = factorizer.factor()
    factored = factorizer.factor(factorizer.leading(planner.plan(before), before))
    assert factored.spectra["0", "linear"].known < 100
    u, s, vh = torch.linalg.svd(weight.double())
    plan = planner.plan(factored, rp.FixedRank(100) if fixed else rp.SingularValue(float(s[99:101].mean())))
    assert plan.ranks == {"0": 100}
    assert plan.decomposed["0"].error == pytest.approx(float(s[100:].square().sum() / s.square().sum()), rel=1e-3)
    project_factored(factorizer, plan, factored, {"0"})
    torch.testing.assert_close(model[0].weight.detach().double(), (u[:, :100] * s[:100]) @ vh[:100], rtol=0, atol=1e-5)


def test_a_large_layer_that_loses_its_rank_has_a_nuclear_term_over_all_ranks_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 10))
    model[0].weight.data = torch.randn(300, 40) @ torch.randn(40, 300) / 300 + 0.01 * torch.randn(300, 300)
    planner = Planner(model, scheme="channel", rule=rp.FixedRank(40))
    factorizer = planner.factorizer
    before = factorizer.factor()
    factored = factorizer.factor(factorizer.leading(planner.plan(before), before))
    assert factored.spectra["0", "linear"].known < 300
    plan = planner.plan(factored, rp.FixedRank(300))
    assert not plan.projected
    weight = model[0].weight.detach().clone()
    term = project_factored(factorizer, plan, factored, {"0"})["0"]
    assert torch.equal(model[0].weight, weight)
    u, _, vh = torch.linalg.svd(weight.double())
    torch.testing.assert_close(term.double(), u @ vh, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("groups", "scheme"), [(2, "channel"), (1, "spatial"), (1, "auto")])
def test_projections_that_start_from_the_last_ones_lose_hardly_more_than_the_best(groups: int, scheme: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(256 * groups, 256 * groups, 3, groups=groups)
    layer.weight.data = sum_of_products(layer.weight.shape, 30).to(memory_format=torch.channels_last)
    trp = rp.TRP(nn.Sequential(layer), scheme=scheme, rule=rp.FixedRank(40), include=["0"])
    trp.project()
    assert trp.state_dict()["starts"]
    with torch.no_grad():
        layer.weight += 0.001 * torch.randn_like(layer.weight)
    before = layer.weight.detach().clone()
    entry = trp.project().decomposed["0"]
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    found, wanted = (schemes.SCHEMES[entry.scheme].to_matrices(layer, w).double() for w in (layer.weight.detach(), before))
    tails = torch.linalg.svdvals(wanted)[:, 40:].square().sum(-1)
    lost = (found - wanted).square().sum((1, 2))
    assert (lost <= 1.02 * tails).all()
    assert set(torch.linalg.matrix_rank(found, rtol=1e-5).tolist()) == {40}


def sum_of_products(shape: torch.Size, terms: int) -> Tensor:
    """A weight of low rank however it is made a matrix, with some noise."""
    along = (torch.randn(size, terms) for size in shape)
    return torch.einsum("nr,cr,hr,wr->nchw", *along) / terms + 0.001 * torch.randn(shape)


def test_finalize_fills_another_model() -> None:
    model, other, (x, _) = network(), network(seed=1), next(iter(batches(1)))
    trp = rp.TRP(model, scheme="spatial", rule=rp.Energy(0.7))
    trp.project()
    small = trp.finalize(into=torch.compile(other, backend="eager"))
    assert_same(other, model)
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(rp.RankPruneError, match="into= is no model like the trained one"):
        trp.finalize(into=nn.Linear(2, 2))


def test_the_nuclear_term_leaves_alone_what_can_have_no_pair() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 1, 1)),
        *(nn.Flatten(), nn.Linear(16, 4)),
    )
    x = torch.randn(2, 3, 8, 8)
    trp = rp.TRP(model, scheme="channel", rule=rp.Energy(0.9), nuclear=0.1, every=100, example_inputs=x)
    trp.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    model(x).sum().mul(0).backward()  # so that the term is all that moves a weight
    optimizer.step()
    moved = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert moved == ["2.weight"]  # 1 is depthwise, 3 has one output: a pair costs more than either


@pytest.mark.parametrize("scheme", ["spatial", "auto"])
def test_once_ranks_are_kept_nothing_is_factored_but_what_is_used(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    x, _ = next(batches(1))
    trp = rp.TRP(model, scheme=scheme, rule=rp.Budget(macs=0.9), every=2, freeze=2, nuclear=1e-2, example_inputs=x)
    trp.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, optimizer, 2)
    assert trp.plan is not None
    planned = [(name, entry.scheme) for name, entry in trp.plan.projected.items()]
    assert 0 < len(planned) < len(CONSIDERED)
    factored = []
    bases = linalg.bases_by_layer
    monkeypatch.setattr(linalg, "bases_by_layer", lambda stacks, *more: factored.append(list(stacks)) or bases(stacks, *more))
    train(model, optimizer, 2)
    trp.finalize()  # projects at the same ranks once more, and decomposes
    assert [sorted(keys) for keys in factored] == [sorted(planned)] * 3
    before = copy.deepcopy(model.state_dict())
    trp.attach(optimizer)
    model(x).sum().mul(0).backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    moved = {name.removesuffix(".weight") for name, value in model.named_parameters() if not value.equal(before[name])}
    assert moved == {name for name, _ in planned}


def test_a_copy_is_not_attached() -> None:
    model = network()
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=2, nuclear=1e-3)
    optimizer = sgd(model)
    trp.attach(optimizer)
    model2, optimizer2, trp2 = copy.deepcopy((model, optimizer, trp))
    again = pickle.loads(pickle.dumps(trp))
    assert trp.attached
    assert trp2.model is model2
    for each in (trp2, again):
        assert not each.attached
    trp2.attach(optimizer2)
    train(model, optimizer, steps=4)
    train(model2, optimizer2, steps=4)
    assert trp.steps == trp2.steps == 4
    assert_same(model2, model)


def test_finalize_keeps_no_subgradients() -> None:
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=2, nuclear=1e-3).attach(optimizer)
    train(model, optimizer, steps=3)
    assert trp._iteration.subgradients
    trp.finalize()
    assert trp._iteration.subgradients is None
