"""Decomposed models that go to a hub and come back, over HTTP to a small one on this machine."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
import toy
from small_hub import Hub

pytest.importorskip("huggingface_hub")

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants

from rankprune.integrations.hub import LowRank
from shareable import ARGUMENTS, MixinNet, Net, same, shared

FILES = {"README.md", "config.json", "model.safetensors", "rankprune.json"}
RESULTS = {"top-1 %": (88.51, 87.71), "ms, batch 64": (None, 40.123456), "loss": (1.23456e-5, 0.0)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def code_of(card: Path) -> str:
    blocks = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_folder_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    low = shared(dtype, results=RESULTS)
    assert low.save_pretrained(tmp_path / "out") is None
    assert names(tmp_path / "out") == FILES
    back = LowRank.from_pretrained(tmp_path / "out", Net)
    same(back.model, low.model)
    assert back.model.head.weight is back.model.table.weight
    assert back.model.norm.num_batches_tracked == 1
    assert not any(module.training for module in back.model.modules())
    assert back.model.conv[0].weight.dtype == dtype
    assert (back.plan, back.builder, back.arguments, back.results) == (low.plan, "shareable:Net", ARGUMENTS, RESULTS)


def test_the_folder_is_an_artefact_and_an_artefact_is_such_a_folder(tmp_path: Path) -> None:
    low, dense = shared(), Net(**ARGUMENTS)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    low.save_pretrained(tmp_path / "ours")
    same(rp.load(tmp_path / "ours", dense), low.model)
    rp.save(tmp_path / "plain", low.model, low.plan)
    back = LowRank.from_pretrained(str(tmp_path / "plain"), dense)
    same(back.model, low.model)
    assert (back.builder, back.arguments, back.results, back.card_data) == (None, {}, {}, None)
    assert dense.training
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_the_card_says_what_it_costs_and_its_code_loads_it(tmp_path: Path) -> None:
    data = ModelCardData(
        license="mit",
        datasets=["cifar10"],
        metrics=["accuracy"],
        tags=["vision", "rankprune"],
        model_name="small",
        eval_results=[EvalResult("image-classification", "cifar10", "CIFAR-10", "accuracy", 87.71)],
    )
    low = shared(results=RESULTS, card_data=data)
    low.save_pretrained(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.license, card.data.datasets) == ("rankprune", "mit", ["cifar10"])
    assert card.data.tags == ["vision", "rankprune", "low-rank", "model_hub_mixin", "pytorch"]
    assert card.data.eval_results[0].metric_value == 87.71
    plan = low.plan
    assert f"| MACs | {plan.macs_dense:,} | {plan.macs:,} | {plan.macs_dense / plan.macs:.2f}x fewer |" in card.text
    assert f"| parameters | {plan.params_dense:,} | {plan.params:,} |" in card.text
    assert "| top-1 % | 88.51 | 87.71 |  |" in card.text
    assert "| ms, batch 64 |  | 40.1235 |  |" in card.text
    assert "| loss | 1.235e-05 | 0.0 |  |" in card.text
    costs, folded, left = card.text.partition("<details><summary>2 layers decomposed</summary>")
    assert folded
    assert "`conv`" not in costs
    conv = plan.decomposed["conv"]
    assert f"| `conv` | Conv1d 32x20x3 | channel | 3 of 32 | {conv.macs_before:,} | {conv.macs_after:,} |" in left
    for name, reason in plan.skipped.items():
        assert f"| `{name}` | {reason} |" in left
    code = code_of(tmp_path / "out" / "README.md")
    assert len(code.splitlines()) <= 10
    found: dict[str, Any] = {}
    exec(code, found)
    same(found["model"], low.model)


def test_a_card_without_a_builder_leaves_the_model_to_the_reader(tmp_path: Path) -> None:
    shared(builder=None).save_pretrained(tmp_path / "out")
    code = code_of(tmp_path / "out" / "README.md")
    with pytest.raises(rp.RankPruneError):
        exec(code, {})
    found: dict[str, Any] = {"Net": Net}
    exec(code.replace("...", "Net(32, sizes=[10, 20])"), found)
    assert isinstance(found["model"].conv, nn.Sequential)


@dataclass(eq=False)
class AsDataclass(nn.Module):
    width: int = 8

    def __post_init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, self.width), nn.Linear(self.width, self.width), nn.Linear(self.width, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_builder_may_be_a_dataclass(tmp_path: Path) -> None:
    dense = AsDataclass(32)
    plan = rp.make_plan(dense, rule=rp.FixedRank(2))
    low = LowRank(rp.decompose(dense, plan), plan, builder=AsDataclass, arguments={"width": 32})
    low.save_pretrained(tmp_path / "out")
    same(LowRank.from_pretrained(tmp_path / "out", AsDataclass).model, low.model)


def test_a_plan_without_macs_has_a_card_without(tmp_path: Path) -> None:
    dense = toy.Net()
    plan = rp.make_plan(dense, rule=rp.FixedRank(2))
    text = LowRank(rp.decompose(dense, plan), plan, builder=toy.Net).generate_model_card(source="me/small").text
    assert "MACs |" not in text
    assert f"{plan.params_dense:,}" in text


def test_a_push_uploads_what_is_saved_and_a_download_loads_it(hub: Hub, tmp_path: Path) -> None:
    low, cache = shared(torch.bfloat16, results=RESULTS, card_data=ModelCardData(license="mit")), tmp_path / "cache"
    url = low.push_to_hub("me/small", token="hf_token")
    assert url.startswith(f"{hub.url}/me/small/commit/")
    low.save_pretrained(tmp_path / "out", model_card_kwargs={"source": "me/small"})
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files.keys() == FILES
    assert 'from_pretrained("me/small", Net)' in hub.files["README.md"].decode()

    hub.files.update({"pytorch_model.bin": b"a pickle", "evil.py": b"print()"})
    back = LowRank.from_pretrained("me/small", Net, cache_dir=cache, token=False)
    same(back.model, low.model)
    (snapshot,) = (cache / "models--me--small" / "snapshots").iterdir()
    assert names(snapshot) == FILES
    same(rp.load(snapshot, Net(**ARGUMENTS)), low.model)


def test_a_branch_of_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    low, other = shared(), shared(builder=None)
    low.push_to_hub("me/small", token="hf_mine", branch="v1", private=True)
    assert [(made["name"], made["visibility"]) for made in hub.created] == [("small", "private")]
    assert hub.tokens["/api/models/me/small/commit/v1"] == "hf_mine"
    assert not hub.files, "nothing went to the main branch"
    other.push_to_hub("me/small", token="hf_mine")
    back = LowRank.from_pretrained("me/small", Net, revision="v1", token="hf_yours", cache_dir=tmp_path)
    same(back.model, low.model)
    assert (back.builder, hub.tokens["/api/models/me/small/revision/v1"]) == ("shareable:Net", "hf_yours")
    assert 'from_pretrained("me/small", Net, revision="v1").model' in hub.branches["v1"]["README.md"].decode()
    assert 'from_pretrained("me/small", dense).model' in hub.files["README.md"].decode()


@pytest.mark.parametrize("environment", [False, True], ids=["local_files_only", "HF_HUB_OFFLINE"])
def test_without_a_network_it_comes_from_the_cache(
    environment: bool, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, sha = shared(), "0" * 40
    snapshot = tmp_path / "models--me--small" / "snapshots" / sha
    low.save_pretrained(snapshot)
    (tmp_path / "models--me--small" / "refs").mkdir()
    for ref in ("main", "v1"):
        (tmp_path / "models--me--small" / "refs" / ref).write_text(sha)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", environment)
    options: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": not environment}
    for revision in (None, "v1", sha):
        same(LowRank.from_pretrained("me/small", Net, revision=revision, **options).model, low.model)
    with pytest.raises(rp.CheckpointError, match=r"'me/other' is no folder.*offline"):
        LowRank.from_pretrained("me/other", Net, **options)
    with pytest.raises(rp.CheckpointError, match=r"check the name, the revision"):
        LowRank.from_pretrained("me/small", Net, revision="v2", **options)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(rp.CheckpointError, match=r"model\.safetensors"):
        LowRank.from_pretrained("me/small", Net, **options)
    assert hub.requests == []


def test_a_repository_that_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(rp.CheckpointError, match=r"'me/none' is no folder, and cannot be had .*RepositoryNotFoundError"):
        LowRank.from_pretrained("me/none", Net, cache_dir=tmp_path, token=False)
    with pytest.raises(rp.CheckpointError, match="HFValidationError"):
        LowRank.from_pretrained("no/such/folder", Net, cache_dir=tmp_path)
    assert any("me/none" in request for request in hub.requests)


def test_a_name_without_its_owner_is_completed_on_the_card(hub: Hub, tmp_path: Path) -> None:
    shared().save_pretrained(tmp_path / "small", push_to_hub=True, token="hf_token")
    assert 'from_pretrained("me/small", Net)' in hub.files["README.md"].decode()
    assert f'from_pretrained("{tmp_path}/small", Net)' in (tmp_path / "small" / "README.md").read_text()


def test_what_was_edited_on_the_hub_is_kept(hub: Hub, tmp_path: Path) -> None:
    shared(results=RESULTS).push_to_hub("me/small", token="hf_token")
    edited = hub.files["README.md"].replace(b"---\n", b"---\nlicense: mit\nwidget: none\n", 1)
    hub.files["README.md"] = edited
    back = LowRank.from_pretrained("me/small", Net, cache_dir=tmp_path, token=False)
    back.push_to_hub("me/small", token="hf_token", ignore_patterns="README.md")
    assert hub.files["README.md"] == edited
    back.push_to_hub("me/small", token="hf_token")
    card = ModelCard(hub.files["README.md"].decode())
    assert (card.data.license, card.data.widget) == ("mit", "none")
    assert card.data.tags == ["low-rank", "model_hub_mixin", "pytorch", "rankprune"]
    assert "| top-1 % | 88.51 | 87.71 |" in card.text


def test_nothing_that_a_file_names_is_imported_or_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_builder.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    low, folder = shared(builder="evil_builder:build"), tmp_path / "out"
    low.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    hostile = {"dense": "x", "model": "x", "plan": {}, "self": 1, "cls": 1, "trust_remote_code": True, "model_id": "x"}
    (folder / "config.json").write_text(json.dumps({**config, **hostile}))
    with pytest.raises(rp.RankPruneError, match=r"evil_builder:build.*width.*not run on a file's word"):
        LowRank.from_pretrained(folder)
    back = LowRank.from_pretrained(folder, Net)
    back.save_pretrained(tmp_path / "again")
    same(LowRank.from_pretrained(tmp_path / "again", Net(**ARGUMENTS)).model, low.model)
    assert "evil_builder" not in sys.modules


def test_a_class_with_the_mixin_needs_no_builder(tmp_path: Path) -> None:
    dense, x = MixinNet(32), torch.randn(3, 16)
    plan = rp.make_plan(dense, x, rule=rp.FixedRank(2))
    low = LowRank(rp.decompose(dense, plan), plan)
    assert (low.builder, low.arguments) == ("shareable:MixinNet", {"width": 32})
    low.save_pretrained(tmp_path / "out")
    found: dict[str, Any] = {}
    exec(code_of(tmp_path / "out" / "README.md"), found)
    same(found["model"], low.model)
    again = LowRank(found["model"], plan)
    assert (again.builder, again.arguments) == (low.builder, low.arguments)


def test_what_the_mixin_itself_saves_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, x = MixinNet(32), torch.randn(3, 16)
    small = rp.decompose(dense, rp.make_plan(dense, x, rule=rp.FixedRank(2)))
    small.save_pretrained(tmp_path / "out")
    assert not torch.allclose(MixinNet.from_pretrained(tmp_path / "out")(x), small(x))  # hence the words in LowRank
    with pytest.raises(rp.CheckpointError, match=r"rankprune\.json is missing.*keeps no plan.*LowRank\(model, plan\)"):
        LowRank.from_pretrained(tmp_path / "out", MixinNet)


def test_a_model_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50, num_labels=3
    )
    dense, tokens = transformers.BertForSequenceClassification(config).eval(), torch.arange(10).view(2, 5)
    plan = rp.make_plan(dense, {"input_ids": tokens}, rule=rp.FixedRank(4))
    low = LowRank(rp.decompose(dense, plan).to(torch.bfloat16), plan)
    assert low.builder == "transformers:BertForSequenceClassification"
    low.save_pretrained(tmp_path / "out")
    found: dict[str, Any] = {}
    exec(code_of(tmp_path / "out" / "README.md"), found)
    same(found["model"], low.model)
    with torch.no_grad():
        assert torch.equal(found["model"](tokens).logits, low.model.eval()(tokens).logits)
    with pytest.raises(ValueError, match="model_type"):  # no random weights without a word
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    low.model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(rp.CheckpointError, match="keeps no plan"):
        LowRank.from_pretrained(tmp_path / "theirs", transformers.BertForSequenceClassification)


def test_a_model_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    arguments = {"model_name": "resnet10t", "num_classes": 3}
    dense = timm.create_model(**arguments)
    plan = rp.make_plan(dense, rule=rp.FixedRank(2), include=["layer1.*"])
    low = LowRank(rp.decompose(dense, plan), plan, builder=timm.create_model, arguments=arguments)
    assert low.builder == "timm:create_model"
    low.save_pretrained(tmp_path / "out")
    found: dict[str, Any] = {}
    exec(code_of(tmp_path / "out" / "README.md"), found)
    same(found["model"], low.model)
