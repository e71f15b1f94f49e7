"""How layers are timed: ranks, settings, cache, noise, and what is timed with them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import own_clock
import rankprune as rp
from own_clock import budget, measured, network
from rankprune.backends import Backend, Program
from rankprune.comparison import compare
from rankprune.distributed import Team
from rankprune.inputs import Inputs
from rankprune.latency import Setting, Subject, measure_layer, meter, ranks_to_try
from rankprune.latency.cache import LatencyCache
from rankprune.planner import Planner
from rankprune.schemes import SCHEMES

pytestmark = pytest.mark.usefixtures("cache_by_own_clock")


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


def test_one_round_has_no_spread() -> None:
    model, x = network()
    with pytest.raises(rp.RankPruneError, match="at least 2"):
        compare({"dense": model}, x, ["timeless"], rounds=1)


def test_what_was_measured_is_not_measured_again(cache_by_own_clock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network()
    first = measured(model, x, budget(0.7))
    (file,) = cache_by_own_clock.iterdir()
    written = json.loads(file.read_text())
    assert written["setting"]["backend"] == "timeless"
    assert {"threads", "dtype", "memory_format", "cpu", "version", "device"} <= written["setting"].keys()
    monkeypatch.setattr(meter, "time_together", None)
    assert measured(model, x, budget(0.7)) == first
    LatencyCache._remembered.clear()  # as in another process
    assert measured(model, x, budget(0.7)) == first
    with pytest.raises(TypeError):  # another batch is another measurement
        measured(model, x[:1], budget(0.7))


def test_inputs_stay_as_they_are_under_a_model_that_changes_them() -> None:
    class Normalising(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.sub_(3).div_(2))

    model, x = network()
    before = x.clone()
    measured(Normalising(model), x, budget(0.7))
    assert torch.equal(x, before)


def test_what_was_measured_is_measured_again_once_its_file_is_gone(
    cache_by_own_clock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network()
    measured(model, x, budget(0.7))
    (file,) = cache_by_own_clock.iterdir()
    file.unlink()
    timings = own_clock.count_timings(monkeypatch)
    measured(model, x, budget(0.7))
    assert timings
    assert file.is_file()


def test_a_cache_of_somebody_else_is_left_alone(cache_by_own_clock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network()
    first = measured(model, x, budget(0.7))
    (file,) = cache_by_own_clock.iterdir()
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask()
    written, read = file.read_bytes(), Path.read_text

    def refuse(path: Path, *args: Any, **options: Any) -> str:
        if path == file:
            raise PermissionError("not yours")
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    LatencyCache._remembered.clear()
    with pytest.warns(UserWarning, match=r"cannot keep latencies in .*not yours.*RANKPRUNE_CACHE"):
        assert measured(model, x, budget(0.7)) == first
    assert file.read_bytes() == written
    assert [f.name for f in cache_by_own_clock.iterdir()] == [file.name]


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


@pytest.mark.parametrize("text", ["", "[]", '{"setting": 1}', "\x80"])
def test_a_damaged_cache_is_measured_anew(cache_by_own_clock: Path, text: str) -> None:
    model, x = network()
    first = measured(model, x, budget(0.7))
    (file,) = cache_by_own_clock.iterdir()
    file.write_bytes(text.encode("latin-1"))
    LatencyCache._remembered.clear()
    assert measured(model, x, budget(0.7)) == first
    assert json.loads(file.read_text())["measured"]


def test_a_machine_too_noisy_is_told_of_and_nothing_is_kept(cache_by_own_clock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(programs: list[Program], x: Inputs) -> list[list[float]]:
        factors = [5.0] + [1.0] * (len(programs) - 1)  # pairs take a fifth
        return [[ms * factor for ms in (1.0, 2.0, 3.0, 4.0, 5.0)] for factor in factors]

    monkeypatch.setattr(meter, "time_together", noisy)
    model, x = network()
    with pytest.warns(rp.NoisyMeasurementWarning, match=r"vary by more than 20%.*the worst by 100%.*Budget\(macs=0.5\)"):
        noisy_ns = measured(model, x, budget(0.9)).network_ns
    (file,) = cache_by_own_clock.iterdir()
    (kept,) = json.loads(file.read_text())["measured"]
    assert kept.endswith("can be taken")
    own_clock.use(monkeypatch)  # the machine is calm again
    assert measured(model, x, budget(0.9)).network_ns != noisy_ns


@pytest.mark.parametrize(("place", "name"), [(meter, "time_together"), (Backend, "_load_each")], ids=["timed", "loaded"])
def test_too_little_memory_for_timing_is_told(monkeypatch: pytest.MonkeyPatch, place: object, name: str) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("2 GiB are not there")

    monkeypatch.setattr(place, name, too_large)
    with pytest.raises(rp.RankPruneError, match=r"too little memory to time .*2 GiB are not there"):
        measured(*network(), rp.Budget(latency=0.9))


def test_of_several_tries_the_calmest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = [(3.0, 0.5), (2.0, 0.2), (1.0, 0.3)]

    def unsteady(programs: list[Program], x: Inputs) -> list[list[float]]:
        ms, noise = tries.pop(0)
        return [[ms * (1 + noise * step) for step in (-0.4, -0.2, 0.0, 0.2, 0.4)]]

    monkeypatch.setattr(meter, "time_together", unsteady)
    model, x = network()
    with meter.Meter.metering(model, "timeless", None) as one:
        (ms,), noise = one._time([model], x)
    assert (ms, tries) == (2.0, [])
    assert noise == pytest.approx(0.2 * 0.6)


def test_one_noisy_program_of_many_is_not_a_noisy_machine(cache_by_own_clock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(programs: list[Program], x: Inputs) -> list[list[float]]:
        found = own_clock.clock(programs, x, 5)
        if len(programs) < 4:
            return found
        return [[ms * factor for ms, factor in zip(found[0], (0.2, 0.6, 1.0, 1.4, 1.8), strict=True)], *found[1:]]

    monkeypatch.setattr(meter, "time_together", noisy)
    measured(*network(), budget(0.9))
    assert cache_by_own_clock.exists()


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


@pytest.mark.parametrize("how", ["autocast", "float32 products", "float32 products, as set by now"])
def test_layers_in_another_precision_are_measured_anew(cache_by_own_clock: Path, how: str) -> None:
    model, x = network()
    measured(model, x, budget(0.7))
    (file,) = cache_by_own_clock.iterdir()
    before = len(json.loads(file.read_text())["measured"])
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            measured(model, x, budget(0.7))
    elif how.endswith("by now"):
        if not hasattr(torch.backends.mkldnn, "matmul"):
            pytest.skip("this torch has no such setting")
        whole = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        try:
            measured(model, x, budget(0.7))
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = whole
    else:
        torch.set_float32_matmul_precision("medium")
        try:
            measured(model, x, budget(0.7))
        finally:
            torch.set_float32_matmul_precision("highest")
    assert len(json.loads(file.read_text())["measured"]) == 2 * before


def test_a_layer_before_batchnorm_and_one_without_are_measured_each() -> None:
    layer, x = nn.Conv2d(32, 32, 3, padding=1, bias=False), torch.randn(2, 32, 4, 4)
    subject = Subject(layer, ((2, 32, 4, 4),), {SCHEMES["spatial"]: [16]})
    alone, normed = (
        measure_layer(nn.Sequential(layer, *tail), x, "0", subject, "timeless").dense_ns
        for tail in ((), (nn.BatchNorm2d(32), nn.ReLU()))
    )
    assert normed == pytest.approx(alone + 64 * own_clock.MS_PER_PARAMETER * 1e6, rel=1e-4)


def test_a_layer_that_runs_twice_counts_twice() -> None:
    model, x = network()
    layer = model[5]
    once, twice = (Subject(layer, ((2, 32, 4, 4),) * calls, {SCHEMES["spatial"]: [16]}) for calls in (1, 2))
    first, second = (measure_layer(model, x, "5", subject, "timeless") for subject in (once, twice))
    assert second.dense_ns == pytest.approx(2 * first.dense_ns, rel=1e-4)
    assert second.pair_ns["spatial"][16] == pytest.approx(2 * first.pair_ns["spatial"][16], rel=1e-4)


def test_a_model_that_was_moved_is_timed_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Here(own_clock.Timeless):
        cpu_only = True

        def placed(self, x: Inputs) -> Inputs:
            return x

        def placed_model(self, model: nn.Module) -> nn.Module:
            return model

    own_clock.add(monkeypatch, Here())
    model, x = network()
    model[3] = nn.Identity()  # whose buffers could not be looked at after the move
    planner = Planner(model, scheme="auto", rule=budget(0.7), example_inputs=x)
    planner.join(Team.alone())
    model.to("meta")
    assert planner.latency is not None
    assert planner.latency.correct(Team.alone(), {"5": ("spatial", 16)})


def test_measuring_leaves_random_numbers_as_they_are(cache_by_own_clock: Path) -> None:
    model, x = network()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measured(model, x, budget(0.7))
    assert cache_by_own_clock.exists()
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


def test_channels_last_and_bfloat16_are_other_settings(cache_by_own_clock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    settings = [json.loads(file.read_text())["setting"] for file in cache_by_own_clock.iterdir()]
    assert {(s["memory_format"], s["dtype"]) for s in settings} == {
        ("contiguous", "float32"),
        ("channels_last", "float32"),
        ("contiguous", "bfloat16"),
    }


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


def test_in_a_channels_last_network_only_convolutions_get_such_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def timed(self: meter.Meter, models: Sequence[nn.Module], x: Tensor, *more: Any) -> tuple[list[float], float]:
        given[type(models[0][0])] = x
        return [1.0] * len(models), 0.0

    monkeypatch.setattr(meter.Meter, "_time", timed)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Linear(4, 4)).to(memory_format=torch.channels_last)
    for name, scheme in (("0", "spatial"), ("1", "linear")):
        subject = Subject(model[int(name)], ((2, 16, 6, 4),), {SCHEMES[scheme]: [2]})
        measure_layer(model, torch.randn(2, 16, 8, 6), name, subject, "timeless")
    assert given[nn.Conv2d].is_contiguous(memory_format=torch.channels_last)
    assert given[nn.Linear].is_contiguous()


def test_channels_last_is_known_in_three_dimensions_too() -> None:
    layer = nn.Conv3d(8, 8, 3).to(memory_format=torch.channels_last_3d)
    plan = rp.make_plan(nn.Sequential(layer, nn.Linear(4, 4)), rule=rp.FixedRank(4), scheme="spatial", include=["0"])
    (first, second), _ = rp.decompose(nn.Sequential(layer, nn.Linear(4, 4)), plan)
    assert all(half.weight.is_contiguous(memory_format=torch.channels_last_3d) for half in (first, second))
    assert not any(half.weight.is_contiguous() for half in (first, second))
    assert meter.Setting.of(layer, "eager").memory_format == "channels_last"
