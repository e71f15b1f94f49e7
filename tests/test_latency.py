import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import own_clock
import rankprune as rp
from own_clock import MS_PER_LAYER, MS_PER_PARAMETER
from rankprune.backends import Program
from rankprune.comparison import compare, layer_curve
from rankprune.cost import Inputs
from rankprune.distributed import Team
from rankprune.latency import LatencyTable, Setting, Subject, measure_layer, meter, ranks_to_try
from rankprune.latency.cache import LatencyCache
from rankprune.latency.followers import followers
from rankprune.planner import Planner
from rankprune.ranks import Candidate, Cost
from rankprune.rules import parse_rule
from rankprune.schemes import SCHEMES
from rankprune.spectrum import Spectrum


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKPRUNE_CACHE", str(tmp_path / "cache"))
    own_clock.add(monkeypatch, own_clock.Timeless())
    own_clock.use(monkeypatch)
    return tmp_path / "cache"


def network() -> tuple[nn.Module, Tensor]:
    """A narrow layer, which no pair makes faster, and wide ones."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 8, 1),
        nn.Conv2d(8, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
    ]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(2, 3, 4, 4)


def budget(fraction: float) -> rp.Budget:
    return rp.Budget(latency=fraction, backend="timeless")


def measured(model: nn.Module, x: Tensor, rule: rp.Budget, scheme: str = "auto") -> LatencyTable:
    """The table that a plan would be made by."""
    planner = Planner(model, scheme=scheme, rule=rule, example_inputs=x)
    planner.join(Team.alone())
    assert planner.latency is not None
    return planner.latency.known


# -- the rule ---------------------------------------------------------------------------------------------------------


def candidate(values: list[float], dense: int, pair_ns: dict[int, int], scheme: str = "channel") -> Candidate:
    spectrum = Spectrum.of(torch.tensor([values], dtype=torch.float64))
    return Candidate(scheme, spectrum, Cost(1, 1), Cost(100, 100, dense), 1, pair_ns)


def test_only_ranks_that_were_measured_and_are_faster_are_chosen() -> None:
    layers = {
        "better": [candidate([4.0, 3, 2, 1], 100, {1: 120, 2: 40, 3: 90, 4: 150})],
        "slower": [candidate([4.0, 1, 1, 1], 50, {1: 50, 2: 60, 4: 70})],
    }
    chosen = rp.Budget(latency=0.95).choose(layers, Cost(1, 1, 200))
    assert (chosen["better"].scheme, chosen["better"].rank) == ("channel", 3)
    assert chosen["slower"].rank is None
    chosen = rp.Budget(latency=0.75).choose(layers, Cost(1, 1, 200))
    assert chosen["better"].rank == 2


def test_the_scheme_is_the_one_that_keeps_more_in_the_same_time() -> None:
    layers = {"layer": [candidate([2.0, 1, 1], 100, {1: 50}), candidate([2.0, 1, 1], 100, {2: 50}, "spatial")]}
    assert rp.Budget(latency=0.5).choose(layers, Cost(1, 1, 100))["layer"].scheme == "spatial"


def test_a_latency_that_cannot_be_met_is_refused() -> None:
    layers = {"layer": [candidate([2.0, 1], 100, {1: 50})]}
    with pytest.raises(rp.RankPruneError, match=r"0\.500 of the latency remain"):
        rp.Budget(latency=0.4).choose(layers, Cost(1, 1, 100))


@pytest.mark.parametrize(
    "text", ["Budget(latency=0.5, backend='onnxruntime')", "Budget(latency=0.5, backend='eager', threads=2)"]
)
def test_the_rule_is_read_from_its_text(text: str) -> None:
    assert repr(parse_rule(text)) == text


def test_what_the_rule_needs_is_asked_for() -> None:
    with pytest.raises(rp.RankPruneError, match="no backend 'tpu'"):
        rp.Budget(latency=0.5, backend="tpu")
    with pytest.raises(rp.RankPruneError, match="needs times: give example inputs"):
        rp.make_plan(network()[0], rule=budget(0.5))


# -- measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("largest", "multiple", "low", "step"),
    [
        (96, 1, [], 8),
        (768, 1, [8, 16, 32], 64),
        (7, 1, [], 1),
        (460, 1, [8, 16], 32),
        (1, 1, [], 1),
        (96, 24, [], 24),
        (5, 7, [], 7),
    ],
)
def test_ranks_to_try_are_multiples_of_a_power_of_two(largest: int, multiple: int, low: list[int], step: int) -> None:
    assert ranks_to_try(largest, 12, multiple) == low + list(range(step, largest + 1, step))


def test_ranks_are_multiples_where_that_is_asked_for() -> None:
    model, x = network()
    plan = rp.make_plan(model, x, rule=budget(0.7), round_to=7)
    assert plan.ranks
    assert all(rank % 7 == 0 for rank in plan.ranks.values())


def test_the_latency_asked_for_is_had() -> None:
    model, x = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = rp.make_plan(model, x, rule=budget(0.6))
    assert plan.ms is not None
    assert plan.ms_dense is not None
    assert plan.ms <= 0.6 * plan.ms_dense
    assert plan.ms_measured == pytest.approx(plan.ms, rel=1e-4)
    assert "1" in plan.skipped  # 32 x 8, which takes longer in two layers
    small = rp.decompose(model, plan)
    found = {t.network: t.ms for t in compare({"dense": model, "small": small}, x, ["timeless"], rounds=9).timings}
    assert found["dense"] / found["small"] == pytest.approx(1 / 0.6, rel=0.1)
    assert found["small"] == pytest.approx(plan.ms, rel=1e-4)
    threads = torch.get_num_threads()
    told = f"predicted, measured {plan.ms_measured:.2f}; timeless, {threads} thread{'s' if threads > 1 else ''}, 2 x 3 x 4 x 4)"
    assert str(plan).splitlines()[-1].endswith(told)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert rp.Plan.from_json(plan.to_json()) == plan


class Costly(own_clock.Timeless):
    """Each layer of a whole network beyond five takes so many milliseconds more, which no layer shows by itself."""

    def __init__(self, ms: float) -> None:
        super().__init__()
        self.ms = ms

    def _load(self, model: nn.Module, x: Inputs) -> Program:
        program = super()._load(model, x)
        layers = sum(isinstance(m, nn.Linear) for m in model.modules())
        program.ms += self.ms * max(0, layers - 5)  # type: ignore[attr-defined]
        return program


def five_layers() -> tuple[nn.Module, Tensor]:
    """87 ms by our clock, of which three layers can save 26 each."""
    torch.manual_seed(0)
    middle = [m for _ in range(3) for m in (nn.Linear(256, 256), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), *middle, nn.Linear(256, 4)), torch.randn(4, 64)


@pytest.mark.parametrize("fraction", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("ms", [2.0, 8.0])
def test_what_pairs_cost_in_the_network_only_is_found(monkeypatch: pytest.MonkeyPatch, ms: float, fraction: float) -> None:
    own_clock.add(monkeypatch, Costly(ms))
    model, x = five_layers()
    plan = rp.make_plan(model, x, rule=budget(fraction))
    found = Costly(ms).load(rp.decompose(model, plan), x).ms  # type: ignore[attr-defined]
    assert found <= 1.001 * fraction * plan.ms_dense
    assert plan.ms == pytest.approx(found, rel=0.01)
    assert plan.ms_measured == pytest.approx(found, rel=1e-4)


def test_layers_that_gain_nothing_in_the_network_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    own_clock.add(monkeypatch, Costly(60.0))
    model, x = five_layers()
    assert not rp.make_plan(model, x, rule=budget(1.0)).ranks
    with pytest.raises(
        rp.RankPruneError, match=r"cannot be met: with every layer at its least rank 1\.000 of the latency remain"
    ):
        rp.make_plan(model, x, rule=budget(0.95))


def test_what_was_measured_is_not_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network()
    first = measured(model, x, budget(0.7))
    (file,) = folder.iterdir()
    written = json.loads(file.read_text())
    assert written["setting"]["backend"] == "timeless"
    assert {"threads", "dtype", "memory_format", "cpu", "version", "device"} <= written["setting"].keys()
    monkeypatch.setattr(meter, "time_together", None)
    assert measured(model, x, budget(0.7)) == first
    with pytest.raises(TypeError):  # another batch is another measurement
        measured(model, x[:1], budget(0.7))


def test_a_machine_too_noisy_is_told_of_and_nothing_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(programs: list[Program], x: Inputs) -> list[list[float]]:
        factors = [5.0] + [1.0] * (len(programs) - 1)  # pairs take a fifth
        return [[ms * factor for ms in (1.0, 2.0, 3.0, 4.0, 5.0)] for factor in factors]

    monkeypatch.setattr(meter, "time_together", noisy)
    model, x = network()
    with pytest.warns(rp.NoisyMeasurementWarning, match=r"vary by more than 20%, the worst by 100%.*Budget\(macs=0.5\)"):
        noisy_ns = measured(model, x, budget(0.9)).network_ns
    assert not folder.exists()
    own_clock.use(monkeypatch)  # the machine is calm again
    assert measured(model, x, budget(0.9)).network_ns != noisy_ns


def test_one_noisy_program_of_many_is_not_a_noisy_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(programs: list[Program], x: Inputs) -> list[list[float]]:
        found = own_clock.clock(programs, x, 5)
        if len(programs) < 4:
            return found
        return [[ms * factor for ms, factor in zip(found[0], (1.0, 2.0, 3.0, 4.0, 5.0), strict=True)], *found[1:]]

    monkeypatch.setattr(meter, "time_together", noisy)
    measured(*network(), budget(0.9))
    assert folder.exists()


class Doubly(own_clock.Timeless):
    """float32 takes twice as long as bfloat16."""

    def _load(self, model: nn.Module, x: Inputs) -> Program:
        program = super()._load(model, x)
        program.ms *= sum(p.element_size() / 2 for p in model.parameters()) / len(list(model.parameters()))  # type: ignore[attr-defined]
        return program


def test_layers_of_another_dtype_are_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixed(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.dtype = dtype
            self.first, self.wide, self.last = nn.Linear(64, 256), nn.Linear(256, 256).to(dtype), nn.Linear(256, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.wide(self.first(x).to(self.dtype)).float())

    own_clock.add(monkeypatch, Doubly())
    narrow, wide = (
        measured(Mixed(dtype), torch.randn(4, 64), budget(1.0)).alone["wide"].dense_ns
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert wide == pytest.approx(2 * narrow, rel=1e-4)


def test_a_layer_that_runs_twice_counts_twice() -> None:
    model, x = network()
    layer = model[5]
    once, twice = (Subject(layer, ((2, 32, 4, 4),) * calls, {SCHEMES["spatial"]: [16]}) for calls in (1, 2))
    first, second = (measure_layer(model, x, "5", subject, "timeless") for subject in (once, twice))
    assert second.dense_ns == pytest.approx(2 * first.dense_ns, rel=1e-4)
    assert second.pair_ns["spatial"][16] == pytest.approx(2 * first.pair_ns["spatial"][16], rel=1e-4)


def test_followers_are_the_modules_that_take_up_the_output() -> None:
    model, x = network()
    layers = {name: model.get_submodule(name) for name in ("1", "2", "5", "7")}
    tails = {name: [type(m) for m in tail] for name, tail in followers(model, x, layers).items()}
    assert tails == {"1": [], "2": [nn.BatchNorm2d, nn.ReLU], "5": [nn.ReLU], "7": []}


def test_followers_end_where_two_modules_take_up_one_tensor() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.left, self.right, self.norm, self.relu = *(nn.BatchNorm2d(4) for _ in range(3)), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            z = self.norm(self.after(self.relu(self.left(y)) + self.right(y)))
            return torch.relu(z) + self.relu(z.clone()) + nn.functional.silu(self.relu(z))

    model = Forked()
    layers = {"layer": model.layer, "after": model.after}
    tails = {n: [type(m) for m in t] for n, t in followers(model, torch.randn(2, 3, 4, 4), layers).items()}
    assert tails == {"layer": [], "after": [nn.BatchNorm2d, nn.ReLU]}


def test_followers_of_a_layer_used_twice_are_those_of_its_first_call() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.first, self.second = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.unused = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.second(self.layer(self.first(self.layer(x)))))

    model = Shared()
    nn.init.constant_(model.first.weight, 7.0)
    found = followers(model, torch.randn(2, 4, 4, 4), {"layer": model.layer, "unused": model.unused})
    assert [type(m) for m in found["layer"]] == [nn.BatchNorm2d]
    assert found["layer"][0].weight[0] == 7
    assert found["unused"] == []


def test_measuring_leaves_random_numbers_as_they_are(folder: Path) -> None:
    model, x = network()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measured(model, x, budget(0.7))
    assert folder.exists()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("backend", "device"), [("eager", "meta"), ("onnxruntime", "cpu")])
def test_the_device_is_where_the_program_runs(backend: str, device: str) -> None:
    assert Setting.of(nn.Linear(2, 2, device="meta"), backend).device == device
    assert Setting.of(nn.Linear(2, 2), backend, 3) == Setting.of(nn.Linear(2, 2, device="cpu"), backend, 3)


def test_threads_that_are_asked_for_are_used_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(own_clock.Timeless):
        """Sees how many threads there are."""

        def _load(self, model: nn.Module, x: Inputs) -> Program:
            seen.add(torch.get_num_threads())
            return super()._load(model, x)

    seen: set[int] = set()
    own_clock.add(monkeypatch, Counting())
    model, x = network()
    before = torch.get_num_threads()
    table = measured(model, x, rp.Budget(latency=0.7, backend="timeless", threads=before + 2))
    assert seen == {before + 2}
    assert table.setting.threads == before + 2
    assert torch.get_num_threads() == before
    seen.clear()
    assert measured(model, x, budget(0.7)).setting.threads == before
    assert seen == {before}


def test_threads_that_a_backend_does_not_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(own_clock.Timeless):
        """Decides on its threads by itself."""

        takes_threads = False
        threads = 5

    own_clock.add(monkeypatch, Own())
    model, x = network()
    for given in (None, 5):
        assert measured(model, x, rp.Budget(latency=0.7, backend="timeless", threads=given)).setting.threads == 5
    with pytest.raises(rp.RankPruneError, match="threads=2: timeless decides that by itself, here on 5"):
        rp.make_plan(model, x, rule=rp.Budget(latency=0.7, backend="timeless", threads=2))
    assert "threads=2" in compare({"dense": model}, x, ["timeless"], threads=2).failed["timeless"]


def test_a_real_backend_from_measuring_to_training(monkeypatch: pytest.MonkeyPatch) -> None:
    own_clock.add(monkeypatch, own_clock.TimedEager())

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4))

    def trainer(model: nn.Module) -> tuple[rp.TRP, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return rp.TRP(model, rule=rp.Budget(latency=0.6), every=2, ramp=4, example_inputs=x).attach(optimizer), optimizer

    x, model = torch.randn(256, 512), build()
    trp, optimizer = trainer(model)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    small = trp.finalize()
    torch.testing.assert_close(small(x), model(x), rtol=1e-3, atol=1e-4)
    assert trp.plan is not None
    assert trp.plan.ms is not None
    assert trp.plan.ms_dense is not None
    assert trp.plan.ms <= 0.6 * trp.plan.ms_dense


def test_channels_last_and_bfloat16_are_other_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Looking(own_clock.Timeless):
        """Sees what single layers are called with."""

        def _load(self, model: nn.Module, x: Inputs) -> Program:
            if isinstance(x, Tensor) and x.shape[1] == 32:
                seen.add((x.is_contiguous(memory_format=torch.channels_last), x.dtype))
            return super()._load(model, x)

    seen: set[tuple[bool, torch.dtype]] = set()
    own_clock.add(monkeypatch, Looking())
    _, x = network()
    for kind in ({}, {"memory_format": torch.channels_last}, {"dtype": torch.bfloat16}):
        made = network()[0].to(**kind)  # type: ignore[call-overload]
        measured(made, x.to(kind.get("dtype", x.dtype)), budget(0.99), "channel")
    assert seen == {(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)}
    settings = [json.loads(file.read_text())["setting"] for file in folder.iterdir()]
    assert {(s["memory_format"], s["dtype"]) for s in settings} == {
        ("contiguous", "float32"),
        ("channels_last", "float32"),
        ("contiguous", "bfloat16"),
    }


# -- comparing --------------------------------------------------------------------------------------------------------


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


@pytest.mark.filterwarnings("ignore::rankprune.NoisyMeasurementWarning")
@pytest.mark.parametrize("backend", ["eager", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_attention_and_several_outputs_can_be_measured(backend: str) -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
            self.body, self.left, self.right = nn.TransformerEncoder(layer, 1), nn.Linear(16, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.body(x)
            return self.left(y), self.right(y)

    x = torch.randn(2, 4, 16)
    table = measured(TwoHeads().eval(), x, rp.Budget(latency=1.0, backend=backend))
    assert table.layers.keys() == {"body.layers.0.linear1", "body.layers.0.linear2", "left"}


@pytest.mark.parametrize("text", ["", "[]", '{"setting": 1}', "\x80"])
def test_a_damaged_cache_is_measured_anew(folder: Path, text: str) -> None:
    model, x = network()
    first = measured(model, x, budget(0.7))
    (file,) = folder.iterdir()
    file.write_bytes(text.encode("latin-1"))
    LatencyCache._remembered.clear()
    assert measured(model, x, budget(0.7)) == first
    assert json.loads(file.read_text())["measured"]


def test_a_backend_that_is_missing_offers_a_budget_of_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    model, x = network()
    with pytest.raises(rp.MissingExtraError, match=r"rankprune\[openvino\].*Budget\(macs=0.5\)"):
        rp.make_plan(model, x, rule=rp.Budget(latency=0.5, backend="openvino"))


@pytest.mark.parametrize("threads", [0, -3, "a", 1.5])
def test_threads_are_a_whole_number(threads: object) -> None:
    with pytest.raises(rp.RankPruneError, match="threads="):
        rp.Budget(latency=0.5, threads=threads)  # type: ignore[arg-type]
