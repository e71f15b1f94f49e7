"""Networks by name, and pretrained weights as the packages that publish them keep them once downloaded."""

from pathlib import Path

import pytest
import torch
from torch import nn

import rankprune as rp
from rankprune.recipes.imagenet_resnet import resnet18
from rankprune.recipes.networks import build, load_weights
from rankprune.state_dicts import save_tensors


def exactly_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not ours[name].equal(theirs[name])]


def test_networks_by_name() -> None:
    assert type(build("resnet20", 10)).__name__ == "CifarResNet"
    made = build("resnet50", 7)
    assert made(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert made.get_parameter("layer1.0.conv2.weight").is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(rp.RankPruneError, match=r"unknown model 'resnet21'; choose one of resnet20, .*resnet50"):
        build("resnet21", 10)


def test_weights_of_a_run_and_of_a_file(tmp_path: Path) -> None:
    trained = build("resnet20", 10)
    (tmp_path / "runs" / "dense").mkdir(parents=True)
    save_tensors(tmp_path / "runs" / "dense" / "dense.safetensors", trained)
    save_tensors(tmp_path / "mine.safetensors", trained)
    for source in ("run:dense", "mine.safetensors", str(tmp_path / "mine.safetensors")):
        model = build("resnet20", 10)
        load_weights(model, source, tmp_path, tmp_path / "runs")
        exactly_same(model, trained)
    with pytest.raises(rp.RankPruneError, match="run that experiment first"):
        load_weights(build("resnet20", 10), "run:other", tmp_path, tmp_path / "runs")


def test_weights_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models", exc_type=Exception)
    published = models.resnet18(weights=None)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    file = Path(models.ResNet18_Weights.IMAGENET1K_V1.url).name
    (tmp_path / "checkpoints").mkdir()
    torch.save(published.state_dict(), tmp_path / "checkpoints" / file)
    model = resnet18()
    load_weights(model, "torchvision:ResNet18_Weights.IMAGENET1K_V1", tmp_path, tmp_path)
    exactly_same(model, published)
    for unknown in ("ResNet18_Weights.OTHER", "resnet18.IMAGENET1K_V1"):
        with pytest.raises(rp.RankPruneError, match=f"cannot get the weights '{unknown}' from torchvision"):
            load_weights(model, f"torchvision:{unknown}", tmp_path, tmp_path)
    with pytest.raises(rp.CheckpointError, match=r"fc\.weight has shape \(1000, 512\) instead of \(10, 512\)"):
        load_weights(build("resnet18", 10), "torchvision:ResNet18_Weights.IMAGENET1K_V1", tmp_path, tmp_path)


def test_weights_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm", exc_type=Exception)
    hub = pytest.importorskip("huggingface_hub")
    published = timm.create_model("resnet18", pretrained=False)
    snapshot = tmp_path / "models--timm--resnet18.tv_in1k" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_tensors(snapshot / "model.safetensors", published)
    (tmp_path / "models--timm--resnet18.tv_in1k" / "refs").mkdir()
    (tmp_path / "models--timm--resnet18.tv_in1k" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = resnet18()
    load_weights(model, "timm:resnet18.tv_in1k", tmp_path, tmp_path)
    exactly_same(model, published)
    with pytest.raises(rp.RankPruneError, match="cannot get the weights 'resnet_of_nobody' from timm"):
        load_weights(model, "timm:resnet_of_nobody", tmp_path, tmp_path)


def test_weights_in_half_precision_are_trained_on_in_float32(tmp_path: Path) -> None:
    torch.save(build("resnet20", 10).half().state_dict(), tmp_path / "half.pth")
    model = build("resnet20", 10)
    load_weights(model, "half.pth", tmp_path, tmp_path)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
