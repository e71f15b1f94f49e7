"""What cannot be shared, and what cannot be loaded from a hub: refused, saying why."""

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import rankprune as rp
import toy

pytest.importorskip("huggingface_hub")

from rankprune.integrations.builder import build, name_of, own_builder
from rankprune.integrations.hub import LowRank
from shareable import ARGUMENTS, Net, shared


def explode(**_: Any) -> nn.Module:
    raise KeyError("weights")


def no_model(**_: Any) -> Any:
    return [1]


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (Net(), r"another|does not fit|shape"),
        (nn.Linear(2, 2), r"does not fit this model"),
        (explode, r"explode raised KeyError: 'weights'; it was called with .*'width': 32.*pass the model itself"),
        (no_model, r"no_model gives a list"),
        (toy.Net, r"Net raised TypeError"),
    ],
)
def test_another_model_is_refused(dense: Any, message: str, tmp_path: Path) -> None:
    shared().save_pretrained(tmp_path / "out")
    with pytest.raises(rp.RankPruneError, match=message):
        LowRank.from_pretrained(tmp_path / "out", dense)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("rankprune.json", None, r"rankprune\.json is missing; give the folder that save\(\) wrote$"),
        ("model.safetensors", None, r"there is no file .*model\.safetensors"),
        ("model.safetensors", "no tensors", r"truncated or not a safetensors file"),
        ("rankprune.json", '{"format": 9, "plan": {}}', r"format 9, this version reads 1"),
        ("config.json", "{", r"config\.json' is damaged: not JSON"),
        ("config.json", "[1]", r"config\.json' is damaged"),
        ("config.json", '{"builder": null, "arguments": 3}', r"config\.json' is damaged: it holds no arguments"),
        ("config.json", '{"builder": 7, "arguments": {}}', r"config\.json' is damaged: builder=7"),
        ("config.json", '{"builder": "os.system(1)", "arguments": {}}', r"config\.json' is damaged: builder='os"),
        ("config.json", '{"builder": null, "arguments": {}, "results": {"a": 1}}', r"is damaged: results\['a'\]=1"),
        ("config.json", '{"builder": null, "arguments": {}, "results": [1]}', r"is damaged: results=\[1\]"),
        ("README.md", "---\n[\n---\n", r"the metadata at the top of .*README\.md' are damaged"),
    ],
)
def test_a_damaged_folder_is_refused(file: str, content: str | None, message: str, tmp_path: Path) -> None:
    shared().save_pretrained(tmp_path / "out")
    (tmp_path / "out" / file).unlink()
    if content is not None:
        (tmp_path / "out" / file).write_text(content)
    with pytest.raises(rp.CheckpointError, match=message):
        LowRank.from_pretrained(tmp_path / "out", Net(**ARGUMENTS))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"builder": lambda: Net()}, r"nobody could import it"),
        ({"builder": "resnet20"}, r"builder='resnet20'.*package\.module:callable"),
        ({"builder": "a:b\nimport os"}, r"package\.module:callable"),
        ({"arguments": {"dtype": torch.float32}}, r"cannot be written to config\.json"),
        ({"arguments": {**ARGUMENTS, "heads": [{0: 4}]}}, r"cannot be written to config\.json \(keys come back as strings\)"),
        ({"builder": nn.Linear, "arguments": {}}, r"Linear cannot be called with arguments=\{\} \(missing a required argument"),
        ({"arguments": {**ARGUMENTS, "colour": 1}}, r"got an unexpected keyword argument 'colour'"),
        ({"results": {"top-1 %": (1.0,)}}, r"results\['top-1 %'\]=\(1\.0,\): give two numbers"),
        ({"results": {"top-1 %": (1.0, None)}}, r"give two numbers"),
        ({"results": {"top-1 %": ("1", 2.0)}}, r"give two numbers"),
        ({"results": {"loss": (None, float("nan"))}}, r"give two numbers"),
    ],
)
def test_what_cannot_be_shared_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(rp.RankPruneError, match=message):
        shared(**more)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rankprune.integrations.hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(rp.MissingExtraError, match=r"huggingface_hub.*pip install 'rankprune\[hub\]'"):
        importlib.import_module("rankprune.integrations.hub")


def test_a_model_that_the_plan_is_not_of_is_refused(tmp_path: Path) -> None:
    with pytest.raises(rp.CheckpointError, match="save the model that decompose"):
        LowRank(Net(**ARGUMENTS), shared().plan).save_pretrained(tmp_path / "out")


def test_whatever_a_download_fails_with_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class ProxyError(Exception):
        """As of the library that the hub's downloads with; no OSError."""

    def fails(*args: Any, **options: Any) -> None:
        raise ProxyError("503 from the proxy")

    monkeypatch.setattr("rankprune.integrations.hub.snapshot_download", fails)
    with pytest.raises(rp.CheckpointError, match=r"'a/b' is no folder.*ProxyError: 503 from the proxy"):
        LowRank.from_pretrained("a/b", Net)


def test_a_configuration_cannot_name_code_to_run() -> None:
    class Config:
        @classmethod
        def from_dict(cls, values: dict[str, Any]) -> dict[str, Any]:
            return values

    class Model(nn.Module):
        config_class = Config

        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__()
            self.config = config

    far = {"limits": [0.0, {"__float__": "Infinity"}], "no": {"__float__": "evil"}}
    assert build(Model, {"config": far}).config == {"limits": [0.0, math.inf], "no": {"__float__": "evil"}}
    hostile = {"_attn_implementation": "evil/kernel", "experts_implementation": "evil/kernel", "use_kernels": True}
    given = {"width": 3, **hostile, "text_config": {"depth": 2, "attn_implementation": "evil/kernel"}, "parts": [hostile]}
    assert build(Model, {"config": given}).config == {"width": 3, "text_config": {"depth": 2}, "parts": [{}]}


def test_what_cannot_be_saved_leaves_the_older_folder_whole(tmp_path: Path) -> None:
    good = shared()
    good.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(rp.CheckpointError):
        LowRank(Net(**ARGUMENTS), good.plan).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_code_from_the_hub_is_no_builder_that_others_can_import() -> None:
    kind = type("Remote", (nn.Module,), {"__module__": "transformers_modules.org.model.1f0c.modeling", "config_class": dict})
    remote = kind()
    remote.config = SimpleNamespace(to_json_string=lambda: "{}")
    assert own_builder(remote) == (None, {"config": {}})
    assert name_of("package.module:build") == "package.module:build"
    with pytest.raises(rp.RankPruneError, match="nobody could import it"):
        name_of(kind)
