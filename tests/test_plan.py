import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankprune as rp
from conv_net import ConvNet, images
from rankprune.latency import Setting


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
    keys = "format layers macs_dense params_dense scheme rule uncounted ms_dense ms_measured setting input_shapes calibrated"
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
        (lambda d: d.update(calibrated="yes"), "calibrated"),
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


def test_a_layer_that_neither_of_two_plans_decomposes_has_the_reasons_of_both() -> None:
    model, x = ConvNet(), images()
    a = rp.make_plan(model, x, rule=rp.Budget(macs=0.99), scheme="channel", exclude=["up"])
    b = rp.make_plan(model, x, rule=rp.FixedRank(3), include=["up"])
    stays = next(name for name, reason in a.skipped.items() if "the budget has room" in reason)
    assert (a | b).skipped[stays] == f"{a.skipped[stays]}; not named by an include pattern"
    c = rp.make_plan(model, x, rule=rp.FixedRank(3), include=["point"])
    assert (b | c).skipped["stem"] == b.skipped["stem"] == "not named by an include pattern"


def test_a_calibrated_plan_says_so(plan: rp.Plan) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    calibrated = rp.make_plan(model, rule=rp.Energy(0.9), calibration=[torch.randn(32, 16)])
    assert calibrated.calibrated
    assert rp.Plan.from_json(calibrated.to_json()) == calibrated
    assert "errors are of the layers' outputs on calibration inputs" in str(calibrated)
    assert not plan.calibrated
    assert "calibration" not in str(plan)


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
