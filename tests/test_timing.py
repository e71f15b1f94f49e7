"""Milliseconds of models and programs."""

import time

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from rankprune.timing import measure_together, spread, time_together


def test_measure() -> None:
    model, x = nn.Linear(256, 256, dtype=torch.bfloat16), torch.zeros(512, 256, dtype=torch.bfloat16)
    timing = rp.measure(model, x, runs=7)
    assert 0 < timing.min_ms <= timing.median_ms < 1000
    assert timing.spread >= 0
    assert (timing.runs, timing.dtype, timing.device) == (7, "bfloat16", "cpu")
    assert (timing.threads, timing.torch) == (torch.get_num_threads(), torch.__version__)
    assert timing.cpu


def test_measure_tells_more_work_from_less() -> None:
    models = {"more": nn.Linear(1024, 2048), "less": nn.Linear(1024, 32)}
    timings = measure_together(models, torch.zeros(64, 1024), runs=9)
    assert timings["more"].min_ms > 2 * timings["less"].min_ms  # medians are of what else runs, too
    assert timings.keys() == models.keys()


def test_what_has_no_weights_is_timed_where_its_inputs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr("rankprune.timing.synchronizer", lambda device: lambda: waited.append(device))
    timing = rp.measure(nn.ReLU(), torch.zeros(2, device="meta"), runs=2)
    assert timing.device == "meta"
    assert {device.type for device in waited} == {"meta"}


def test_measure_takes_a_dict_and_a_single_run() -> None:
    timing = rp.measure(nn.Bilinear(3, 4, 5), {"input1": torch.zeros(2, 3), "input2": torch.zeros(2, 4)}, runs=1)
    assert (timing.runs, timing.spread) == (1, 0)
    assert timing.min_ms == timing.median_ms > 0


def test_the_model_runs_in_eval_and_inference_mode() -> None:
    calls = []
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: calls.append((torch.is_inference_mode_enabled(), model.training)))
    rp.measure(model, torch.zeros(1, 2), runs=4)
    assert calls[0] == (False, False)  # it fills caches, which must outlive inference mode
    assert len(calls) > 5
    assert set(calls[1:]) == {(True, False)}


def test_no_run_at_all_is_refused() -> None:
    with pytest.raises(rp.RankPruneError, match="runs=0: give at least one run"):
        rp.measure(nn.Linear(2, 2), torch.zeros(1, 2), runs=0)


def test_programs_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    order: list[str] = []
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def program(name: str, ms: float):
        def run(x: object) -> list[Tensor]:
            nonlocal now
            order.append(name)
            now += ms / 1e3
            return []

        return run

    slow, fast = time_together([program("slow", 4.0), program("fast", 0.25)], torch.zeros(1), rounds=5)
    assert slow == pytest.approx([4.0] * 5)
    assert fast == pytest.approx([0.25] * 5)
    assert order[-6:] == ["slow", "fast", "fast"] * 2  # what is over too soon runs several times


def test_spread_is_the_distance_of_quartiles_by_the_median() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == pytest.approx((6 - 2) / 4)
    assert spread([2.0] * 5) == spread([2.0]) == 0
