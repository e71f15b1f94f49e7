import importlib
import subprocess
import sys
import zipfile
from collections import UserDict
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from rankprune.backends import BACKENDS, Backend, FileBackend, backend_named
from rankprune.comparison import compare
from rankprune.inputs import on_device, tensors

QUICK = ["eager", "onnxruntime", "openvino"]


def network() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(72, 5)
    )
    model[1].running_mean.normal_()
    x = torch.randn(2, 3, 10, 10)
    return rp.decompose(model, rp.make_plan(model, x, scheme="spatial", rule=rp.FixedRank(4))).eval(), x


class Named(nn.Module):
    """Takes its inputs by name and returns several outputs."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(4, width)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"difference": self.linear(left) - self.linear(2 * right), "sum": left + right}


LONG = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the exporters' own
EVERY = [pytest.param(name, marks=[] if name in QUICK else LONG) for name in BACKENDS]


@pytest.mark.parametrize("name", EVERY)
def test_a_program_computes_what_the_model_does(name: str) -> None:
    pytest.importorskip(BACKENDS[name].package)
    model, x = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with BACKENDS[name].on_threads(1 if BACKENDS[name].takes_threads else None):
        program = BACKENDS[name].load(model, x)
    torch.testing.assert_close(program(x), [model(x)], rtol=1e-4, atol=1e-5)
    another = torch.randn_like(x)
    torch.testing.assert_close(program(another), [model(another)], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert BACKENDS[name].installed
    assert BACKENDS[name].version


@pytest.mark.parametrize("name", EVERY)
def test_inputs_by_name_and_several_outputs(name: str) -> None:
    pytest.importorskip(BACKENDS[name].package)
    model, x = Named().eval(), {"left": torch.randn(2, 4), "right": torch.randn(2, 4)}
    torch.testing.assert_close(BACKENDS[name].load(model, x)(x), tensors(model(**x)), rtol=1e-4, atol=1e-5)


def test_what_torch_compiles_need_not_have_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    test_inputs_by_name_and_several_outputs("compile")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_many_models_at_once_are_each_their_own(name: str) -> None:
    pytest.importorskip(name)
    models, x = [Named(n).eval() for n in (1, 2, 3)], {"left": torch.randn(2, 4), "right": torch.randn(2, 4)}
    programs = BACKENDS[name].load_each(models, x)
    for model, program in zip(models, programs, strict=True):
        torch.testing.assert_close(program(x), tensors(model(**x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_process_can_be_signalled_after_its_programs_are_gone(name: str) -> None:
    """Two OpenVINO cores left a signal stack that was no longer mapped: a DataLoader's worker that ended killed it."""
    pytest.importorskip(name)
    code = f"""
import signal, torch
from rankprune.backends import BACKENDS
backend, model, x = BACKENDS[{name!r}], torch.nn.Linear(4, 2).eval(), torch.randn(1, 4)
first, second = backend.load(model, x), backend.load(model, x)
first(x), second(x)
del first
del second
signal.signal(signal.SIGCHLD, lambda *_: print("handled"))
signal.raise_signal(signal.SIGCHLD)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout.splitlines()[-1:]) == (0, ["handled"]), run.stderr


@pytest.mark.slow
def test_compiled_models_of_one_class_are_all_compiled() -> None:
    x = torch.randn(2, 6)
    models = [nn.Sequential(nn.Linear(6, n), nn.ReLU()).eval() for n in range(1, 13)]  # torch.compile gives up at 8
    counters = torch._dynamo.utils.counters
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        programs = BACKENDS["compile"].load_each(models, x)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled >= len(models)
    for model, program in zip(models, programs, strict=True):
        torch.testing.assert_close(program(x), [model(x)], rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == compiled, "the programs are kept"
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), pytest.raises(Exception, match="limit"):
        Backend._load_each(BACKENDS["compile"], models, x)  # as other backends do


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted as Linux shows them")
def test_onnx_runtime_has_as_many_threads_as_are_asked_for() -> None:
    code = """
import os, torch
from rankprune.backends import BACKENDS
backend, model, x = BACKENDS["onnxruntime"], torch.nn.Linear(4, 4).eval(), torch.zeros(2, 4)
backend.load(model, x)
for threads in (1, 3):
    before = len(os.listdir("/proc/self/task"))
    with backend.on_threads(threads):
        program = backend.load(model, x)
    print(len(os.listdir("/proc/self/task")) - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # no others' threads
    assert run.stdout.split() == ["0", "2"], "and the one that calls"


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.takes_threads])
def test_threads_are_what_was_asked_for_and_then_what_they_were(name: str) -> None:
    pytest.importorskip(BACKENDS[name].package)
    backend, before = BACKENDS[name], torch.get_num_threads()
    with suppress(ZeroDivisionError), backend.on_threads(before + 1):
        assert backend.threads == torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert backend.threads == torch.get_num_threads() == before


@pytest.mark.filterwarnings("ignore")
def test_executorch_decides_on_its_threads() -> None:
    pytest.importorskip("executorch")
    backend = BACKENDS["executorch"]
    assert backend.threads >= 1
    with backend.on_threads(backend.threads):
        pass
    with pytest.raises(rp.RankPruneError, match="executorch decides that by itself"), backend.on_threads(backend.threads + 1):
        pass


@pytest.mark.parametrize("name", BACKENDS)
def test_what_runs_on_the_cpu_gets_model_and_inputs_there(name: str) -> None:
    class Elsewhere(nn.Module):
        """Stands for a model on another device: knows when it is copied to the CPU."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.there = nn.Parameter(torch.zeros(2, device="meta")), True

        def cpu(self) -> "Elsewhere":
            self.there = False
            return self

    backend, model, x = BACKENDS[name], Elsewhere(), {"x": [torch.zeros(2), 3], "y": (torch.zeros(1), "text")}
    assert backend.cpu_only == (name in ("onnxruntime", "openvino", "executorch"))
    placed = backend.placed_model(model)
    assert (placed is model, placed.there) == ((False, False) if backend.cpu_only else (True, True))
    assert model.there
    assert backend.placed(x) == x
    with pytest.raises(NotImplementedError) if backend.cpu_only else nullcontext():  # no values to copy
        backend.placed({"x": [torch.zeros(2, device="meta")]})
    here = nn.Linear(2, 2)
    assert backend.placed_model(here) is here


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", QUICK)
def test_a_model_on_a_gpu_computes_the_same_in_every_backend(name: str, tmp_path: Path) -> None:
    pytest.importorskip(BACKENDS[name].package)
    model, x = network()
    expected = tensors(model(x))
    backend, model, x = BACKENDS[name], model.cuda(), x.cuda()
    (found,) = backend.load(model, x)(backend.placed(x))
    torch.testing.assert_close(found.cpu(), expected[0], rtol=1e-3, atol=1e-4)
    assert next(model.parameters()).is_cuda
    if isinstance(backend, FileBackend):
        rp.export(model, x, tmp_path / f"model{backend.suffix}", tolerance=1e-2)


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
    elsewhere = type("Elsewhere", (type(BACKENDS["openvino"]),), {"package": "no_such_package.part"})
    assert not elsewhere().installed


def test_executorch_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch.extension.pybindings", None)  # as where it was built for another torch
    backend = BACKENDS["executorch"]
    with pytest.raises(rp.MissingExtraError, match=r"rankprune\[executorch\]"), backend.on_threads(2):
        pass


def test_inputs_keep_their_types_when_they_are_moved() -> None:
    class Outputs(UserDict):
        """Knows its parts by number, too, like those of transformers, and is not to be updated."""

        def update(self, *args: Any, **kwargs: Any) -> None:
            assert not self.data, "only when it is made"
            super().update(*args, **kwargs)

    inputs = {"encoded": Outputs(hidden=torch.zeros(2)), "other": MappingProxyType({"x": torch.ones(1)})}
    found = on_device(inputs, "meta")
    assert type(found["encoded"]) is Outputs
    assert found["encoded"]["hidden"].is_meta
    assert found["other"]["x"].is_meta
    assert not inputs["encoded"]["hidden"].is_meta


def test_a_backend_that_there_is_not() -> None:
    with pytest.raises(rp.RankPruneError, match=r"no backend 'tflite'; choose one of .*onnxruntime"):
        backend_named("tflite")


def test_suffixes_are_distinct() -> None:
    suffixes = [b.suffix for b in BACKENDS.values() if isinstance(b, FileBackend)]
    assert len(set(suffixes)) == len(suffixes) > 1


def test_what_fails_only_when_it_runs_is_refused_too() -> None:
    pytest.importorskip("openvino")
    model = nn.Linear(4, 4).bfloat16()
    x = torch.zeros(2, 4, dtype=torch.bfloat16)
    with pytest.raises(rp.ExportError, match=r"Linear cannot be exported to openvino .*BFloat16"):
        BACKENDS["openvino"].load(model, x)
    found = compare({"dense": model}, x, ["openvino", "eager"], rounds=2)
    assert (found.failed.keys(), [t.backend for t in found.timings]) == ({"openvino"}, ["eager"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_aot_inductor_leaves_no_libraries_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    x = torch.randn(2, 3, 8, 8)
    program = BACKENDS["aot_inductor"].load(nn.Sequential(nn.Conv2d(3, 8, 3)), x)
    assert program(x)
    assert not [file for kind in ("*.so", "*.pt2", "*.o") for file in (tmp_path / "cache").rglob(kind)]


@pytest.mark.slow
def test_aot_inductor_folds_batchnorm(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    rp.export(model, torch.randn(2, 3, 8, 8), tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        code = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp"))
    assert "relu" in code
    assert "batch_norm" not in code
    assert "sqrt" not in code
