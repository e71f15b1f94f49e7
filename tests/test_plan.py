import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from rankprune import linalg
from rankprune.latency import Setting
from rankprune.planner import Planner
from rankprune.schemes import CHOICES


class ConvNet(nn.Module):
    """Strided, grouped, dilated, depthwise, transposed, pointwise and one-dimensional convolutions, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.strided = nn.Conv2d(16, 32, (3, 5), stride=(2, 1), padding=(1, 2), bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 32, 3, padding="same", dilation=2, groups=2, padding_mode="reflect")
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.drop = nn.Dropout(0.5)
        self.up = nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1, output_padding=(0, 1))
        self.point = nn.Conv2d(16, 24, 1)
        self.line = nn.Conv1d(24, 20, 5, stride=3)
        self.tokens = nn.Linear(20, 40)
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.strided(self.stem(x)).relu()).relu()
        x = self.drop(self.depthwise(self.grouped(x)))
        x = self.line(self.point(self.up(x)).flatten(2))
        x = self.tokens(self.tokens(x.transpose(1, 2))[..., :20])  # linear layers over leading axes, called twice
        return self.head(x.relu()).mean(1)


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


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
def test_the_totals_are_those_of_the_decomposed_model(scheme: str, rule: rp.ranks.RankRule) -> None:
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
def test_planning_leaves_the_model_as_it_was(rule: rp.ranks.RankRule, training: bool) -> None:
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
    with pytest.raises(ArithmeticError):
        rp.make_plan(model, x, rule=rp.Energy(0.5))
    assert_undisturbed(model, before)


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


# -- the value itself -------------------------------------------------------------------------------------------------


@pytest.fixture
def plan() -> rp.Plan:
    return rp.make_plan(ConvNet(), images(), scheme="auto", rule=rp.Budget(macs=0.5), exclude=["point"])


def test_a_plan_survives_json(plan: rp.Plan, tmp_path: Path) -> None:
    assert rp.Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    assert rp.Plan.load(tmp_path / "plan.json") == plan
    uncounted = rp.make_plan(ConvNet(), rule=rp.FixedRank(2))
    assert rp.Plan.from_json(uncounted.to_json()) == uncounted


def test_the_json_form_is_fixed(plan: rp.Plan) -> None:
    data = json.loads(plan.to_json())
    keys = "format layers macs_dense params_dense scheme rule uncounted ms_dense ms_measured setting input_shapes"
    assert list(data) == keys.split()
    assert data["format"] == 1
    assert data["rule"] == "Budget(macs=0.5)"
    fields = "name kind shape scheme rank full_rank macs_before macs_after params_before params_after error reason"
    assert all(list(layer) == [*fields.split(), "ms_before", "ms_after"] for layer in data["layers"])


def test_a_plan_is_frozen(plan: rp.Plan) -> None:
    with pytest.raises(FrozenInstanceError):
        plan.scheme = "channel"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        plan.layers[0].rank = 1  # type: ignore[misc]
    assert {plan: "a plan can be a key"}[rp.Plan.from_json(plan.to_json())]


def test_every_layer_is_in_the_plan_in_the_models_order(plan: rp.Plan) -> None:
    holders = ["stem", "strided", "grouped", "depthwise", "up", "point", "line", "tokens", "head"]
    assert [layer.name for layer in plan.layers] == holders
    assert list(plan.decomposed) == list(plan.ranks)
    assert set(plan.decomposed) | set(plan.skipped) == set(holders)
    assert not set(plan.decomposed) & set(plan.skipped)
    assert {"stem", "point", "head"} <= set(plan.skipped)
    assert all(plan.skipped.values())


def test_a_printed_plan_shows_every_decision(plan: rp.Plan) -> None:
    text = str(plan)
    for layer, line in zip(plan.layers, text.splitlines()[1:], strict=False):
        assert line.startswith(f"{layer.name} ")
        assert (layer.reason in line) if layer.rank is None else (f" {layer.rank}/{layer.full_rank} " in line)
    assert f"MACs {plan.macs_dense:,} > {plan.macs:,}" in text
    assert f"params {plan.params_dense:,} > {plan.params:,}" in text


SETTING = Setting("onnxruntime", "1.2", 2, "float32", "contiguous", "cpu", "a processor", 4, "2.13.0")


def test_a_plan_tells_where_its_milliseconds_are_from(plan: rp.Plan) -> None:
    timed = replace(plan, ms_dense=26.6, setting=SETTING, input_shapes=((1, 3, 224, 224), (7,)))
    told = "onnxruntime, 2 threads, 1 x 3 x 224 x 224, 7)"
    assert str(timed).splitlines()[-1] == f"ms 26.60 > 26.60 (1.00x faster, predicted; {told}"
    assert rp.Plan.from_json(timed.to_json()) == timed
    assert json.loads(timed.to_json())["setting"]["cpu"] == "a processor"
    on_a_gpu = replace(timed, setting=replace(SETTING, backend="eager", threads=1, device="cuda", cpu="an accelerator"))
    assert "; eager, an accelerator, 1 x 3" in str(on_a_gpu)
    assert "2 threads" not in str(on_a_gpu)
    assert "1 thread," in str(replace(timed, setting=replace(SETTING, threads=1)))
    assert str(plan).splitlines()[-1].startswith("params ")


def test_a_plan_from_before_there_was_a_setting_is_read(plan: rp.Plan) -> None:
    text = edited(replace(plan, ms_dense=3.0).to_json(), lambda d: [d.pop(key) for key in ("setting", "input_shapes")])
    assert rp.Plan.from_json(text) == replace(plan, ms_dense=3.0)
    assert str(rp.Plan.from_json(text)).endswith("faster, predicted)")


# -- bad input --------------------------------------------------------------------------------------------------------


def edited(text: str, edit: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(text)
    edit(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda d: d.update(format=2), "format 1"),
        (lambda d: d.pop("format"), "format 1"),
        (lambda d: d.pop("rule"), "rule"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.pop("layers"), "layers"),
        (lambda d: d.update(layers=3), "int"),
        (lambda d: d.update(layers=[3]), "int"),
        (lambda d: d["layers"][0].pop("rank"), "field"),
        (lambda d: d["layers"][0].update(colour="red"), "colour"),
        (lambda d: d["layers"][0].update(shape=3), "int"),
        (lambda d: d.update(setting={"backend": "eager"}), "threads"),
        (lambda d: d.update(setting=3), "int"),
        (lambda d: d["layers"].append(d["layers"][0]), "twice"),
        (lambda d: d["layers"][0].update(error="x"), "error"),
        (lambda d: d["layers"][0].update(ms_before="x"), "ms_before"),
        (lambda d: d["layers"][0].update(shape=[3, "x"]), "shape"),
        (lambda d: d.update(input_shapes=[["x"]]), "shape"),
        (lambda d: d.update(params_dense=1.5), "params_dense"),
        (lambda d: d.update(macs_dense="x"), "macs_dense"),
        (lambda d: d.update(ms_measured="x"), "ms_measured"),
    ],
)
def test_a_foreign_plan_says_what_differs(plan: rp.Plan, edit: Callable, named: str) -> None:
    with pytest.raises(rp.CheckpointError, match=named):
        rp.Plan.from_json(edited(plan.to_json(), edit))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "garbage", '{"format": 1}', '{"layers": []}'])
def test_what_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(rp.CheckpointError, match="plan"):
        rp.Plan.from_json(text)
    with pytest.raises(rp.CheckpointError, match=r"nowhere\.json"):
        rp.Plan.load(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(rp.CheckpointError, match=r"binary\.json"):
        rp.Plan.load(tmp_path / "binary.json")


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


def test_two_plans_in_one() -> None:
    model, x = ConvNet(), images()
    a = rp.make_plan(model, x, scheme="channel", rule=rp.FixedRank(2), include=["strided"])
    b = rp.make_plan(model, x, scheme="spatial", rule=rp.FixedRank(3), include=["up"])
    timed = [replace(plan, ms_dense=1.0, ms_measured=0.5, input_shapes=((1,),)) for plan in (a, b)]
    for both in (a | b, timed[0] | timed[1]):
        assert both.ranks == {"strided": 2, "up": 3}
        assert both.macs == a.macs + b.macs - a.macs_dense
        assert (both.scheme, both.rule) == ("auto", "FixedRank(rank=2); FixedRank(rank=3)")
        assert (both.ms, both.ms_dense, both.ms_measured, both.setting, both.input_shapes) == (None, None, None, None, ())
    assert (a | replace(b, scheme="channel")).scheme == "channel"
    other = rp.make_plan(model, torch.cat([x, x]), rule=rp.FixedRank(3), include=["up"])
    for wrong in (other, rp.make_plan(nn.Sequential(nn.Linear(8, 8)), rule=rp.FixedRank(2), include=["*"])):
        with pytest.raises(rp.RankPruneError, match="not of the same model, or not of example inputs"):
            a | wrong


def test_a_plan_that_cannot_be_written_leaves_the_older_one_whole(
    plan: rp.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(rp.RankPruneError, match="there is no folder"):
        plan.save(tmp_path / "none" / "plan.json")
    plan.save(tmp_path / "plan.json")

    def full(file: Path, text: str) -> None:
        file.write_bytes(text.encode()[:100])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        plan.save(tmp_path / "plan.json")
    assert rp.Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_by_another_rule_than_the_planners_says_so() -> None:
    planner = Planner(ConvNet(), scheme="spatial", rule=rp.Energy(0.9))
    factored = planner.factorizer.factor()
    assert [planner.plan(factored, rule).rule for rule in (None, rp.Energy(0.5))] == ["Energy(keep=0.9)", "Energy(keep=0.5)"]
