from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from conv_net import ConvNet, images
from rankprune import linalg
from rankprune.planner import Planner
from rankprune.schemes import CHOICES


def state(model: nn.Module) -> dict[str, Any]:
    """All that planning could disturb."""
    tensors = {k: (v, v.clone()) for k, v in (*model.named_parameters(), *model.named_buffers())}
    modes = [(type(m), m.training) for m in model.modules()]
    wanting = [p.requires_grad for p in model.parameters()]
    return {"tensors": tensors, "modes": modes, "wanting": wanting, "rng": torch.get_rng_state()}


def assert_undisturbed(model: nn.Module, before: dict[str, Any]) -> None:
    now = state(model)
    assert now["modes"] == before["modes"]
    assert now["wanting"] == before["wanting"]
    assert torch.equal(now["rng"], before["rng"])
    assert now["tensors"].keys() == before["tensors"].keys()
    for name, (tensor, value) in before["tensors"].items():
        assert torch.equal(now["tensors"][name][0], value), name
        assert not isinstance(tensor, nn.Parameter) or now["tensors"][name][0] is tensor
        assert tensor.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- totals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", CHOICES)
@pytest.mark.parametrize("rule", [rp.FixedRank(1), rp.RankFraction(0.3), rp.Energy(0.5), rp.Budget(macs=0.5)])
def test_the_totals_are_those_of_the_decomposed_model(scheme: str, rule: rp.rules.RankRule) -> None:
    model, x = ConvNet(), images()
    plan = rp.make_plan(model, x, scheme=scheme, rule=rule, include=["*"])
    dense, small = rp.count(model, x), rp.count(rp.decompose(model, plan), x)
    assert (plan.macs_dense, plan.params_dense) == (dense.macs, dense.params)
    assert (plan.macs, plan.params) == (small.macs, small.params)
    assert len(plan.decomposed) >= 3
    assert plan.macs < plan.macs_dense
    rows = {row.name: row for row in small.layers}
    for name, entry in plan.decomposed.items():
        assert entry.macs_after == rows[f"{name}.0"].macs + rows[f"{name}.1"].macs
        assert entry.params_after == rows[f"{name}.0"].params + rows[f"{name}.1"].params
        assert entry.macs_after < entry.macs_before


def test_known_costs_of_a_known_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    plan = rp.make_plan(model, torch.zeros(1, 3, 10, 10), scheme="channel", rule=rp.FixedRank(5))
    assert (plan.macs_dense, plan.params_dense) == (100 * (27 * 16 + 144 * 16), 27 * 16 + 144 * 16 + 32)
    entry = plan.decomposed["1"]
    assert (entry.rank, entry.full_rank, entry.scheme, entry.shape) == (5, 16, "channel", (16, 16, 3, 3))
    assert (entry.macs_before, entry.macs_after) == (100 * 2304, 100 * 5 * 160)
    assert (entry.params_before, entry.params_after) == (2304 + 16, 5 * 160 + 16)
    values = torch.linalg.svdvals(model[1].weight.detach().double().flatten(1))
    assert entry.error == pytest.approx(float(values[5:].square().sum() / values.square().sum()), rel=1e-5)


@pytest.mark.parametrize("scheme", CHOICES)
@pytest.mark.parametrize(("metric", "fraction"), [("macs", 0.4), ("macs", 0.8), ("params", 0.4), ("params", 0.8)])
def test_a_budget_is_met_from_below_within_two_percent(scheme: str, metric: str, fraction: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 3), *[nn.Conv2d(24, 24, 3, padding=1) for _ in range(20)])
    plan = rp.make_plan(model, torch.zeros(1, 3, 6, 6), scheme=scheme, rule=rp.Budget(**{metric: fraction}))
    before = plan.macs_dense if metric == "macs" else plan.params_dense
    after = plan.macs if metric == "macs" else plan.params
    assert 0.98 * fraction * before <= after <= fraction * before


def test_auto_is_the_cheapest_scheme_of_each_layer() -> None:
    model, x = ConvNet(), images()
    after: dict[str, dict[str, int]] = {}
    for scheme in CHOICES:
        for e in rp.make_plan(model, x, scheme=scheme, rule=rp.Energy(0.6), include=["*"]).layers:
            after.setdefault(e.name, {})[scheme] = e.macs_after
    assert all(costs["auto"] == min(costs.values()) for costs in after.values())
    assert all(any(costs[s] > costs["auto"] for costs in after.values()) for s in CHOICES[:-1])


def test_without_example_inputs_the_plan_has_no_macs() -> None:
    plan = rp.make_plan(ConvNet(), rule=rp.FixedRank(1))
    assert plan.macs is plan.macs_dense is None
    assert "MACs" not in str(plan).splitlines()[-2]
    assert plan.params < plan.params_dense


@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_ranks_are_multiples(round_to: int) -> None:
    plan = rp.make_plan(ConvNet(), images(), rule=rp.Budget(params=0.5), round_to=round_to)
    assert plan.ranks
    assert all(e.rank % round_to == 0 or e.rank == e.full_rank for e in plan.decomposed.values())


# -- the model is left as it was --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rule", [rp.Energy(0.5), rp.Budget(macs=0.5)])
def test_planning_leaves_the_model_as_it_was(rule: rp.rules.RankRule, training: bool) -> None:
    model, x = ConvNet().train(training), images()
    model.norm.train(not training)  # modes may be mixed
    before = state(model)
    rp.make_plan(model, x, rule=rule)
    assert_undisturbed(model, before)


class Restless(nn.Module):
    """Changes something at each forward pass, also in eval mode."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", None)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "random numbers":
            x = x + torch.rand_like(x)
        elif self.what == "a buffer in place":
            self.calls += 1
        elif self.what == "a new buffer":
            self.calls = self.calls + 1
        elif self.what == "an empty buffer":
            self.cache = torch.ones(3)
        elif self.what == "a buffer that goes":
            del self.cache
        return self.head(self.body(x))


@pytest.mark.parametrize(
    "what", ["random numbers", "a buffer in place", "a new buffer", "an empty buffer", "a buffer that goes"]
)
def test_what_a_forward_pass_changes_is_put_back(what: str) -> None:
    model, x = Restless(what), torch.randn(2, 16)
    before = state(model)
    rp.make_plan(model, x, rule=rp.FixedRank(2))
    assert_undisturbed(model, before)


class Failing(ConvNet):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise ArithmeticError


def test_a_forward_pass_that_fails_leaves_the_model_as_it_was() -> None:
    model, x = Failing(), images()
    before = state(model)
    with pytest.raises(rp.RankPruneError, match=r"does not run on these example inputs.*ArithmeticError"):
        rp.make_plan(model, x, rule=rp.Energy(0.5))
    assert_undisturbed(model, before)


def test_example_inputs_without_an_example_are_refused() -> None:
    with pytest.raises(rp.RankPruneError, match="the example inputs are empty"):
        rp.make_plan(ConvNet(), images()[:0], rule=rp.Budget(macs=0.5))


def test_the_check_sees_a_disturbed_model() -> None:
    model = ConvNet()
    for disturb in (model.eval, lambda: torch.rand(1), lambda: model(images()), lambda: model.norm.train(False)):
        before = state(model.train())
        disturb()
        with pytest.raises(AssertionError):
            assert_undisturbed(model, before)


@pytest.mark.parametrize("pack", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_example_inputs_may_be_a_tensor_a_tuple_or_a_dict(pack: Callable[[Tensor], Any]) -> None:
    model, x = ConvNet(), images()
    assert rp.make_plan(model, pack(x), rule=rp.FixedRank(1)) == rp.make_plan(model, x, rule=rp.FixedRank(1))


def test_planning_is_deterministic() -> None:
    model, x = ConvNet(), images()
    assert rp.make_plan(model, x, rule=rp.Budget(macs=0.5)) == rp.make_plan(model, x, rule=rp.Budget(macs=0.5))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"include": ["stem", "layer9.*"]}, r"include pattern 'layer9\.\*'"),
        ({"exclude": ["haed"]}, "exclude pattern 'haed'"),
        ({"scheme": "tucker"}, "'tucker'"),
        ({"round_to": 0}, "round_to=0"),
        ({"round_to": -2}, "round_to=-2"),
        ({"round_to": 1.5}, r"round_to=1\.5"),
        ({"rule": "Energy(keep=0.9)"}, "rule='Energy"),
        ({"rule": rp.Budget(macs=0.5)}, r"Budget\(macs=0\.5.*example inputs"),
        ({"include": ["point"], "scheme": "decoupled"}, "point.*scheme='auto'"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(rp.RankPruneError, match=named):
        rp.make_plan(ConvNet(), **{"rule": rp.FixedRank(1), **options})


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = ConvNet()
    nn.init.constant_(model.grouped.weight[0], torch.nan)
    with pytest.raises(rp.FactorizationError, match="'grouped'"):
        rp.make_plan(model, rule=rp.Energy(0.9))


def test_spectra_alone_are_the_same_and_nothing_else_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(ConvNet(), scheme="auto", rule=rp.FixedRank(2))
    whole = planner.factorizer.factor()
    monkeypatch.setattr(linalg, "_BATCH", 2000)  # in several parts
    alone = planner.factorizer.factor(spectra_only=True)
    assert not alone.stacks
    assert not alone.bases
    assert whole.spectra.keys() == alone.spectra.keys() == whole.bases.keys()
    for key, spectrum in whole.spectra.items():
        torch.testing.assert_close(alone.spectra[key].values, spectrum.values)
    assert planner.plan(alone) == planner.plan(whole)


def test_a_plan_by_another_rule_than_the_planners_says_so() -> None:
    planner = Planner(ConvNet(), scheme="spatial", rule=rp.Energy(0.9))
    factored = planner.factorizer.factor()
    assert [planner.plan(factored, rule).rule for rule in (None, rp.Energy(0.5))] == ["Energy(keep=0.9)", "Energy(keep=0.5)"]
