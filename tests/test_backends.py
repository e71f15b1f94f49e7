import importlib
import sys

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from rankprune.backends import BACKENDS, FileBackend, backend_named
from rankprune.backends.base import tensors
from rankprune.backends.onnxruntime import quantize_onnx
from rankprune.backends.timing import spread, time_together

QUICK = ["eager", "onnxruntime", "openvino"]
NEEDS = {"openvino": "openvino", "executorch": "executorch"}


def network() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(72, 5)
    )
    model[1].running_mean.normal_()
    x = torch.randn(2, 3, 10, 10)
    return rp.decompose(model, rp.make_plan(model, x, scheme="spatial", rule=rp.FixedRank(4))).eval(), x


class Named(nn.Module):
    """Takes its inputs by name and returns several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"difference": self.linear(left) - self.linear(2 * right), "sum": left + right}


def names(*, quick: bool) -> list[str]:
    return [name for name in BACKENDS if (name in QUICK) == quick]


def check(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    model, x = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    program = BACKENDS[name].load(model, x, threads=1)
    torch.testing.assert_close(program(x), [model(x)], rtol=1e-4, atol=1e-5)
    another = torch.randn_like(x)
    torch.testing.assert_close(program(another), [model(another)], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert BACKENDS[name].installed
    assert BACKENDS[name].version


@pytest.mark.parametrize("name", names(quick=True))
def test_a_program_computes_what_the_model_does(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporters' own
@pytest.mark.parametrize("name", names(quick=False))
def test_a_program_that_takes_long_to_make_computes_what_the_model_does(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", QUICK)
def test_inputs_by_name_and_several_outputs(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    model, x = Named().eval(), {"left": torch.randn(2, 4), "right": torch.randn(2, 4)}
    torch.testing.assert_close(BACKENDS[name].load(model, x)(x), tensors(model(**x)), rtol=1e-4, atol=1e-5)


def test_many_models_at_once_are_each_their_own() -> None:
    x = torch.randn(2, 3, 8, 8)
    models = [nn.Conv2d(3, n, 3).eval() for n in (1, 2, 3)]
    programs = BACKENDS["onnxruntime"].load_each(models, x, threads=1)
    for model, program in zip(models, programs, strict=True):
        torch.testing.assert_close(program(x), [model(x)], rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_be_exported_is_named() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(rp.ExportError, match="Branching cannot be exported to onnxruntime"):
        BACKENDS["onnxruntime"].load(Branching(), torch.ones(2, 2))


def test_a_backend_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    importlib.invalidate_caches()
    with pytest.raises(rp.MissingExtraError, match=r"rankprune\[openvino\]"):
        BACKENDS["openvino"].load(*network())


def test_a_backend_that_there_is_not() -> None:
    with pytest.raises(rp.RankPruneError, match="no backend 'tflite'; choose one of eager, compile, onnxruntime"):
        backend_named("tflite")


def test_suffixes_are_distinct() -> None:
    suffixes = [b.suffix for b in BACKENDS.values() if isinstance(b, FileBackend)]
    assert len(set(suffixes)) == len(suffixes) == 4


def test_quantized_file_is_smaller_and_computes_about_the_same(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 9)
    ).eval()
    x = torch.randn(8, 3, 12, 12)
    small = rp.decompose(model, rp.make_plan(model, x, scheme="channel", rule=rp.RankFraction(0.5)))
    rp.export_onnx(small, x, tmp_path / "float.onnx")
    quantize_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", [torch.randn(8, 3, 12, 12) for _ in range(4)])
    assert (tmp_path / "int8.onnx").stat().st_size < 0.6 * (tmp_path / "float.onnx").stat().st_size
    assert {f.name for f in tmp_path.iterdir()} == {"float.onnx", "int8.onnx"}
    expected = small(x).detach()
    backend = BACKENDS["onnxruntime"]
    assert isinstance(backend, FileBackend)
    (found,) = backend.read(tmp_path / "int8.onnx")(x)
    difference = float((found - expected).norm() / expected.norm())
    assert 1e-4 < difference < 0.1


def test_programs_are_timed_in_turn() -> None:
    order: list[str] = []

    def program(name: str, seconds: float):
        def run(x: object) -> list[Tensor]:
            order.append(name)
            torch.zeros(1).add_(1)
            import time

            time.sleep(seconds)
            return []

        return run

    slow, fast = time_together([program("slow", 0.004), program("fast", 0.002)], torch.zeros(1), rounds=5)
    assert len(slow) == len(fast) == 5
    assert order[-4:] == ["slow", "fast", "slow", "fast"]
    assert min(slow) >= 4.0
    assert 1.3 < sorted(slow)[2] / sorted(fast)[2] < 3


def test_spread_is_the_distance_of_quartiles_by_the_median() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == pytest.approx((6 - 2) / 4)
    assert spread([2.0] * 5) == 0
