"""Training under a budget of latency: when, how often and by whom times are measured."""

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import own_clock
import rankprune as rp
from rankprune.backends import Program
from rankprune.inputs import Inputs
from rankprune.latency import LatencyTable, NetworkLatency, meter
from rankprune.latency.cache import LatencyCache

EVERY, RAMP = 2, 4


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKPRUNE_CACHE", str(tmp_path / "cache"))
    own_clock.add(monkeypatch, own_clock.Timeless(ms_per_square=2e-9))
    own_clock.use(monkeypatch)
    return tmp_path / "cache"


def network() -> nn.Module:
    """Ranks by equal singular values are far from those by its own: one layer is of low rank, all but for noise."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(64, 32, 3, padding=1), nn.Flatten(), nn.Linear(512, 48), nn.ReLU(), nn.Linear(48, 4)]
    with torch.no_grad():
        layers[6].weight.mul_(0.01).add_(0.02 * torch.randn(48, 4) @ torch.randn(4, 512))
    return nn.Sequential(*layers)


def test_layers_without_a_rank_to_try_are_not_timed() -> None:
    model = nn.Sequential(*network()[:4], nn.Conv2d(64, 64, 1, groups=64), *network()[4:])
    trp = make(model)
    trp.attach(sgd(model))
    assert "no rank is cheaper" in trp.project().skipped["4"]
    assert "4" not in trp.state_dict()["latency"]["alone"]


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(9))


def make(model: nn.Module, fraction: float = 0.5, **more: Any) -> rp.TRP:
    rule = rp.Budget(latency=fraction, backend="timeless", threads=more.pop("threads", None))
    return rp.TRP(model, scheme="auto", rule=rule, example_inputs=X, **{"every": EVERY, "ramp": RAMP, **more})


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(8) % 4).backward()
        optimizer.step()


def table_of(trp: rp.TRP) -> LatencyTable:
    assert trp._planner.latency is not None
    return trp._planner.latency.known


def forget(folder: Path) -> None:
    """As in another process on another day: nothing is remembered."""
    LatencyCache._remembered.clear()
    for file in folder.iterdir():
        file.unlink()


def test_times_are_measured_when_attached_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = own_clock.count_timings(monkeypatch)
    model = network()
    trp = make(model)
    assert timings == []
    assert trp.state_dict()["latency"] is None
    optimizer = sgd(model)
    trp.attach(optimizer)
    assert len(timings) == 3 + 2  # its layers, the network for all of them, and as the rule would have it
    before = table_of(trp)
    trp.detach()
    trp.attach(optimizer)
    assert len(timings) == 5
    assert table_of(trp) == before


def test_without_an_optimizer_times_are_measured_at_the_first_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = own_clock.count_timings(monkeypatch)
    trp = make(network(), ramp=0)
    trp.project()
    small = trp.finalize()
    assert len(timings) == 3 + 2 + 1
    assert trp.plan is not None
    assert trp.plan.ms is not None
    assert trp.plan.ms <= 0.5 * (trp.plan.ms_dense or 0)
    assert small(X).shape == (2, 4)


def test_a_budget_that_cannot_be_met_is_told_when_attached() -> None:
    model = network()
    trp, optimizer = make(model, 0.01), sgd(model)
    for _ in range(2):
        with pytest.raises(rp.RankPruneError, match=r"latency=0\.01.*cannot be met"):
            trp.attach(optimizer)
    make(model).attach(optimizer)  # it is not left attached
    with pytest.raises(rp.RankPruneError, match=r"macs=0\.0001.*cannot be met"):
        rp.TRP(model, rule=rp.Budget(macs=0.0001), example_inputs=X)


def trained(steps: int, **more: Any) -> tuple[nn.Module, torch.optim.Optimizer, rp.TRP]:
    model = network()
    optimizer = sgd(model)
    trp = make(model, **more).attach(optimizer)
    train(model, optimizer, range(steps))
    return model, optimizer, trp


@pytest.mark.parametrize("more", [{}, {"freeze": RAMP}, {"nuclear": 1e-3}], ids=str)
def test_times_are_set_right_once_when_the_ramp_is_over(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    model = network()
    optimizer = sgd(model)
    trp = make(model, **more).attach(optimizer)
    timings = own_clock.count_timings(monkeypatch)
    tables, counts = [table_of(trp)], [0]
    for step in range(10):
        train(model, optimizer, range(step, step + 1))
        tables.append(table_of(trp))
        counts.append(len(timings))
    assert counts == [0] * RAMP + [1] * (11 - RAMP)
    assert timings == [2]  # the network dense and decomposed
    assert tables[RAMP] != tables[0]
    assert tables[0] == tables[RAMP - 1]
    assert tables[RAMP] == tables[-1]
    small = trp.finalize()
    assert len(timings) == 1
    assert trp.plan is not None
    (ms,) = {p.ms for p in own_clock.Timeless(2e-9).load_each([small], X)}  # type: ignore[attr-defined]
    assert trp.plan.ms == pytest.approx(ms, rel=0.02)


def test_times_set_right_are_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    def error(trp: rp.TRP) -> float:
        small = trp.finalize()
        assert trp.plan is not None
        assert trp.plan.ms is not None
        (program,) = own_clock.Timeless(2e-9).load_each([small], X)
        return abs(trp.plan.ms / program.ms - 1)  # type: ignore[attr-defined]

    after = error(trained(RAMP)[2])
    monkeypatch.setattr(NetworkLatency, "correct", lambda *args, **options: None)
    assert after < 0.5 * error(trained(RAMP)[2])


def test_a_budget_set_right_in_finalize_inside_the_ramp(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, trp = trained(3)
    timings = own_clock.count_timings(monkeypatch)
    with pytest.warns(UserWarning, match="before the ramp did"):
        trp.finalize()
    assert timings == [2]


@pytest.mark.parametrize("stop", [3, 5], ids=["in the ramp", "after it"])
@pytest.mark.parametrize("order", ["before attach", "after attach"])
def test_resumed_is_uninterrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, stop: int, order: str) -> None:
    whole, _, reference = trained(8, freeze=6)
    model, optimizer, trp = trained(stop, freeze=6)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict(), trp.state_dict()))
    forget(folder)

    resumed = network()
    optimizer2 = sgd(resumed)
    trp2 = make(resumed, freeze=6)
    if order == "before attach":
        resumed.load_state_dict(states[0])
        optimizer2.load_state_dict(states[1])
        trp2.load_state_dict(states[2])
        timings = own_clock.count_timings(monkeypatch)
        trp2.attach(optimizer2)
        assert timings == []
    else:
        trp2.attach(optimizer2)
        resumed.load_state_dict(states[0])
        optimizer2.load_state_dict(states[1])
        trp2.load_state_dict(states[2])
        timings = own_clock.count_timings(monkeypatch)
    assert table_of(trp2) == table_of(trp)
    train(resumed, optimizer2, range(stop, 8))
    assert timings == ([2] if stop < RAMP else [])
    assert table_of(trp2) == table_of(reference)
    assert trp2.plan == reference.plan
    assert trp2.history == reference.history
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_measuring_does_not_disturb_a_training(folder: Path) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(5)
        model = nn.Sequential(*network(), nn.Dropout(0.5))
        optimizer = sgd(model)
        make(model).attach(optimizer)
        train(model, optimizer, range(6))
        return list(model.parameters())

    first = run()  # measures
    second = run()  # knows
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_state_of_other_times_is_refused() -> None:
    state = trained(1)[2].state_dict()
    setting = state["latency"]["setting"]
    for change, more in (
        ({"backend": "eager"}, {}),
        ({"dtype": "bfloat16"}, {}),
        ({"threads": 7}, {"threads": 3}),
    ):
        other = {**state, "latency": {**state["latency"], "setting": {**setting, **change}}}
        trp = make(network(), **more)
        with pytest.raises(rp.RankPruneError, match="this state goes by times measured as"):
            trp.load_state_dict(other)
        assert trp.steps == 0


def test_a_state_of_other_inputs_or_ranks_is_refused() -> None:
    state = trained(1)[2].state_dict()
    rule = rp.Budget(latency=0.5, backend="timeless")
    with pytest.raises(rp.RankPruneError, match=r"measured on inputs of \[\(2, 3, 4, 4\)\], not of \[\(6, 3, 4, 4\)\]"):
        rp.TRP(network(), scheme="auto", rule=rule, every=EVERY, example_inputs=X.repeat(3, 1, 1, 1)).load_state_dict(state)
    with pytest.raises(rp.RankPruneError, match="times of other layers or at other ranks"):
        make(network(), round_to=7).load_state_dict(state)


def test_times_go_through_json() -> None:
    _, _, trp = trained(3)
    state, trp2 = trp.state_dict(), make(network())
    trp2.load_state_dict({**state, "latency": json.loads(json.dumps(state["latency"]))})
    assert table_of(trp2) == table_of(trp)


def test_times_from_elsewhere_are_kept_and_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    trp = trained(3)[2]
    table = replace(table_of(trp), setting=replace(table_of(trp).setting, cpu="another", threads=17))
    resumed = network()
    optimizer = sgd(resumed)
    trp2 = make(resumed)
    trp2.load_state_dict({**trp.state_dict(), "latency": asdict(table)})
    monkeypatch.setattr(meter, "time_together", None)
    trp2.attach(optimizer)
    with pytest.warns(UserWarning, match="cannot be set right"):
        train(resumed, optimizer, range(3, 5))
    assert table_of(trp2) == table
    assert trp2.plan is not None
    assert trp2.plan.setting == table.setting


def test_a_training_goes_on_where_the_budget_cannot_be_met_by_the_times_set_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, trp = trained(RAMP - 1)
    table = table_of(trp)
    monkeypatch.setattr(meter, "time_together", lambda programs, x: [[programs[0].ms] * 15 for _ in programs])  # nothing gained
    with pytest.warns(UserWarning, match=r"latency=0\.5.*cannot be met.*ranks go by the earlier ones"):
        train(model, optimizer, range(RAMP - 1, RAMP))
    assert table_of(trp) == table
    train(model, optimizer, range(RAMP, RAMP + 4))
    trp.finalize()
    assert trp.plan is not None
    assert trp.plan.ms is not None
    assert trp.plan.ms <= 0.5 * (trp.plan.ms_dense or 0)


def test_a_machine_that_is_slower_than_before_sets_no_times_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(programs: list, x: Inputs, rounds: int = 15) -> list[list[float]]:
        return [[1.5 * program.ms + 2.0] * rounds for program in programs]

    model, optimizer, trp = trained(RAMP - 1)
    table, (file,) = table_of(trp), folder.iterdir()
    kept = file.read_text()
    monkeypatch.setattr(meter, "time_together", busy)
    with pytest.warns(
        rp.NoisyMeasurementWarning, match="1 of 1 measurements on this machine vary by more than 20%, or are as far"
    ):
        train(model, optimizer, range(RAMP - 1, RAMP))
    assert table_of(trp) == table
    assert file.read_text() == kept
    with pytest.warns(rp.NoisyMeasurementWarning):
        trp.finalize()
    assert trp.plan is not None
    assert trp.plan.ms is not None
    assert trp.plan.ms_measured is None


def test_a_machine_that_is_faster_than_before_sets_times_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def calm(programs: list, x: Inputs, rounds: int = 15) -> list[list[float]]:
        return [[0.6 * program.ms] * rounds for program in programs]

    model, optimizer, trp = trained(RAMP - 1)
    network_ns = table_of(trp).network_ns
    monkeypatch.setattr(meter, "time_together", calm)
    train(model, optimizer, range(RAMP - 1, RAMP))
    assert table_of(trp).network_ns == pytest.approx(0.6 * network_ns)
    assert trp.plan is not None
    assert trp.plan.ms_measured == pytest.approx(trp.plan.ms, rel=1e-2)


def test_the_network_is_timed_as_it_is_decomposed_in_the_end() -> None:
    model, _, trp = trained(RAMP + 1)
    table = table_of(trp)
    with torch.no_grad():
        model[6].weight.normal_()  # other ranks than those chosen after the ramp
    with pytest.warns(UserWarning, match="changed without this TRP since"):
        small = trp.finalize()
    assert trp.plan is not None
    assert table.measured_ns({name: (e.scheme or "", e.rank or 0) for name, e in trp.plan.decomposed.items()}) is None
    (program,) = own_clock.Timeless(2e-9).load_each([small], X)
    assert trp.plan.ms_measured == pytest.approx(program.ms, rel=1e-4)  # type: ignore[attr-defined]
    assert (table_of(trp).share, table_of(trp).overhead_ns) == (table.share, table.overhead_ns)


def test_a_failure_while_timing_the_end_is_told_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(programs: list, x: Inputs, rounds: int = 15) -> list[list[float]]:
        raise rp.ExportError("no")

    model, _, trp = trained(RAMP + 1)
    with torch.no_grad():
        model[6].weight.normal_()
    monkeypatch.setattr(meter, "time_together", broken)
    told = pytest.warns(UserWarning, match="the decomposed network could not be timed: no")
    with told, pytest.warns(UserWarning, match="changed without this TRP since"):
        small = trp.finalize()
    assert trp.plan is not None
    assert trp.plan.ms_measured is None
    torch.testing.assert_close(small(X), model(X), rtol=1e-3, atol=1e-4)


def test_a_state_of_times_goes_into_a_safe_file(tmp_path: Path) -> None:
    state = trained(RAMP)[2].state_dict()
    torch.save(state, tmp_path / "trp.pt")
    make(network()).load_state_dict(torch.load(tmp_path / "trp.pt", weights_only=True))


def test_a_layer_that_cannot_be_timed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(own_clock.Timeless):
        """Takes no pairs of convolutions by themselves."""

        def _load(self, model: nn.Module, x: Inputs) -> Program:
            if not isinstance(model[-1], nn.Linear) and sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 2:
                raise ValueError("no")
            return super()._load(model, x)

    own_clock.add(monkeypatch, Picky())
    model = network()
    with pytest.raises(rp.ExportError, match=r"layer '2', Conv2d\(32, 64.* or as a pair: .*\(no\).*Budget\(macs=0\.5\)"):
        make(model).attach(sgd(model))


def test_a_failure_while_measuring_leaves_it_unattached(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(programs: list, x: Inputs, rounds: int = 15) -> list[list[float]]:
        raise rp.ExportError("no")

    model = network()
    optimizer = sgd(model)
    trp = make(model)
    with monkeypatch.context() as patch:
        patch.setattr(meter, "time_together", broken)
        with pytest.raises(rp.ExportError, match=r"no; or budget in MACs, like Budget\(macs=0.5\)"):
            trp.attach(optimizer)
    trp.attach(optimizer)
    assert table_of(trp).network_ns


def test_the_share_of_time_is_logged() -> None:
    _, _, trp = trained(RAMP)
    assert trp.plan is not None
    assert trp.plan.ms is not None
    assert trp.metrics()["rankprune/ms"] == trp.plan.ms / (trp.plan.ms_dense or 0) <= 0.5
    plain = rp.TRP(network(), rule=rp.FixedRank(4))
    plain.project()
    assert "rankprune/ms" not in plain.metrics()


def test_the_plan_tells_where_times_were_measured() -> None:
    plan = trained(RAMP)[2].plan
    assert plan is not None
    assert plan.setting is not None
    assert (plan.setting.backend, plan.setting.device, plan.setting.dtype) == ("timeless", "cpu", "float32")
    assert plan.input_shapes == ((2, 3, 4, 4),)
    assert rp.Plan.from_json(plan.to_json()) == plan
