"""The state_dicts that users have are read, and every other file gets a clear word."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import rankprune as rp
from rankprune.recipes.resnet import resnet
from rankprune.state_dicts import load_exactly, read_tensors

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_state_dict_files(tmp_path: Path, suffix: str, prefix: str) -> None:
    path, state = tmp_path / f"weights{suffix}", {prefix + name: value for name, value in STATE.items()}
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    found = read_tensors(path)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], value) for name, value in STATE.items())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "ema"])
def test_nested_state_dict(tmp_path: Path, key: str) -> None:
    torch.save({"epoch": 3, key: {f"module.{n}": v for n, v in STATE.items()}, "optimizer": {}}, tmp_path / "c.pt")
    assert read_tensors(tmp_path / "c.pt").keys() == STATE.keys()


def test_the_state_of_an_average_of_weights(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    torch.save({"ema": AveragedModel(model).state_dict()}, tmp_path / "ema.pth")
    found = read_tensors(tmp_path / "ema.pth")
    assert found.keys() == {"weight", "bias"}
    assert torch.equal(found["weight"], model.weight)


def test_a_prefix_that_the_model_has_too_is_a_name(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(3, 2)

    model, other = Wrapper(), Wrapper()
    torch.save(other.state_dict(), tmp_path / "c.pt")
    load_exactly(model, read_tensors(tmp_path / "c.pt", model), "c.pt")
    assert torch.equal(model.module.weight, other.module.weight)
    assert read_tensors(tmp_path / "c.pt", nn.Linear(3, 2)).keys() == {"weight", "bias"}


def test_a_prefix_on_some_names_only_is_a_name(tmp_path: Path) -> None:
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "c.pt")
    assert read_tensors(tmp_path / "c.pt").keys() == {"module.a", "b"}


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, torch.zeros(2)], ids=str)
def test_file_without_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(rp.CheckpointError, match=r"c\.pt.*no state_dict.*save model\.state_dict\(\)"):
        read_tensors(tmp_path / "c.pt")


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2))])
@pytest.mark.parametrize("content", [lambda mark: {**STATE, "x": Exploit(mark)}, lambda mark: nn.Linear(2, 2)])
def test_a_pickle_of_more_is_refused_unexecuted(tmp_path: Path, write: Callable, content: Callable) -> None:
    write(content(tmp_path / "executed"), tmp_path / "c.pt")
    with pytest.raises(rp.CheckpointError, match=r"save model\.state_dict\(\) alone"):
        read_tensors(tmp_path / "c.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "c.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 8, 61):
        path.write_bytes(whole[:size])
        with pytest.raises(rp.CheckpointError, match=r"c\.pt"):
            read_tensors(path)


@pytest.mark.parametrize("content", [b"hello\n", b'{"a": 1}', b"\x89PNG\r\n\x1a\n" + bytes(60), bytes(100)], ids=str)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_foreign_files(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(content)
    with pytest.raises(rp.CheckpointError, match="foreign"):
        read_tensors(path)


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "no.pt", tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(rp.CheckpointError, match="no file"):
            read_tensors(path)


def test_weights_saved_on_a_gpu(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    with zipfile.ZipFile(buffer) as saved, zipfile.ZipFile(tmp_path / "gpu.pt", "w") as moved:
        for entry in saved.infolist():
            data = saved.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
                assert b"cuda:0" in data
            moved.writestr(entry.filename, data)
    found = read_tensors(tmp_path / "gpu.pt")
    assert {value.device.type for value in found.values()} == {"cpu"}
    assert torch.equal(found["a.weight"], STATE["a.weight"])


DATA = Path(os.environ.get("RANKPRUNE_DATA", "data"))
PRETRAINED = next((p for p in (DATA / "models", DATA.parent / "models") if p.is_dir()), DATA) / "resnet20-12fca82f.th"


@pytest.mark.skipif(not PRETRAINED.is_file(), reason="no pretrained ResNet-20 in or beside RANKPRUNE_DATA")
def test_pretrained_resnet20_loads_unchanged() -> None:
    model = resnet("resnet20")
    tensors = read_tensors(PRETRAINED)
    load_exactly(model, tensors, str(PRETRAINED))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in tensors.items())
    assert len(tensors) >= sum(1 for _ in model.parameters())
