"""Minutes, a compiler, a GPU or real data: run with make test-slow, and RANKPRUNE_DATA set for the last."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import rankprune as rp
from coloured import coloured, write_parquet
from rankprune.recipes.batches import TrainBatches, eval_batches
from rankprune.recipes.evaluation import top1
from rankprune.recipes.experiment import Experiment, Folders, TrpConfig
from rankprune.recipes.images import ImageSet, load_images
from rankprune.recipes.networks import build
from rankprune.recipes.photograph_batches import PhotographBatches, PhotographConfig
from rankprune.recipes.photographs import load_photographs
from rankprune.recipes.processes import joined
from rankprune.recipes.resnet import CifarResNet, resnet
from rankprune.recipes.runner import run
from rankprune.recipes.schedule import TrainConfig
from rankprune.recipes.training import train
from rankprune.state_dicts import load_exactly, read_tensors

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def noise(count: int = 64) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 4, ("a", "b", "c", "d"))


def trained(config: TrainConfig, device: str = "cpu") -> tuple[nn.Module, rp.TRP]:
    torch.manual_seed(0)
    model = CifarResNet(8, classes=4).to(device)
    x = torch.zeros(1, 3, 8, 8, device=device)
    trp = rp.TRP(model, scheme="spatial", rule=rp.Budget(macs=0.5), every=2, nuclear=1e-3, example_inputs=x)
    log = train(model, TrainBatches(noise(), 16, device=device), config, trp=trp)
    assert log[-1].loss < log[0].loss
    return model, trp


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_training_goes_as_an_eager_one():
    config = TrainConfig(epochs=4, lr=0.05, precision="float32", compile=False)
    eager, _ = trained(config)
    compiled, trp = trained(replace(config, compile=True))
    for (name, a), b in zip(eager.state_dict().items(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert len(trp.history) == 8


@pytest.mark.slow
@pytest.mark.gpu
@CUDA
def test_what_is_trained_on_a_gpu_is_loaded_on_a_cpu(tmp_path):
    model, trp = trained(TrainConfig(epochs=4, lr=0.05, precision="bfloat16", compile=False), "cuda")
    small = trp.finalize()
    x = torch.randn(4, 3, 8, 8)
    assert (small.eval()(x.cuda()) - model.eval()(x.cuda())).abs().max() < 1e-3
    assert trp.plan is not None
    rp.save(tmp_path, small, trp.plan)
    loaded = rp.load(tmp_path, CifarResNet(8, classes=4)).eval()
    assert next(loaded.parameters()).device.type == "cpu"
    torch.testing.assert_close(loaded(x), small(x.cuda()).cpu(), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("photographs", [None, PhotographConfig(sizes=(8,), test_split="test", test_resize=8, test_size=8)])
def test_experiments_run_on_a_gpu(tmp_path, photographs):
    for split, count in (("train", 48), ("test", 16)):
        write_parquet(tmp_path / "data" / "tiny" / f"{split}-0.parquet", coloured(count, 8))
    folders = Folders(tmp_path / "data", tmp_path / "models", tmp_path / "runs")
    config = TrainConfig(epochs=2, lr=0.02, compile=False)
    dense = Experiment("dense", "dense", dataset="tiny", batch=16, training=config, photographs=photographs)
    ours = replace(
        dense,
        name="ours",
        method="ours",
        start="run:dense",
        reference="run:dense",
        training=replace(config, distill=0.7),
        trp=TrpConfig(every=2, freeze=0.5),
    )
    with joined() as processes:
        assert processes.device == "cuda:0"
        results = [run(e, folders, processes=processes) for e in (dense, ours)]
    assert results[1]["macs"] < results[1]["macs_dense"] / 2
    assert results[1]["gpu"] == torch.cuda.get_device_name()
    small = rp.load(tmp_path / "runs" / "ours" / "artefact", build("resnet20", 4))
    assert next(small.parameters()).device.type == "cpu"


@pytest.mark.slow
def test_a_pretrained_network_on_real_images_keeps_more_when_calibrated():
    folders = Folders.from_environment()
    weights, images = folders.models / "resnet20-12fca82f.th", Path(folders.data) / "cifar10"
    if "RANKPRUNE_DATA" not in os.environ or not weights.is_file() or not images.is_dir():
        pytest.skip("no CIFAR-10 and pretrained ResNet-20 in RANKPRUNE_DATA")
    model = resnet("resnet20")
    load_exactly(model, read_tensors(weights), str(weights))
    rest, held_out = load_images(images, "train").split(1000)
    calibration = [x for x, _ in eval_batches(rest.subset(torch.arange(512)), 256)]
    plan = rp.make_plan(model, calibration[0][:1], scheme="spatial", rule=rp.Budget(macs=0.5))
    dense, plain, calibrated = (
        top1(network, eval_batches(held_out))
        for network in (model, rp.decompose(model, plan), rp.decompose(model, plan, calibration=calibration))
    )
    assert dense > 80
    assert plain < dense - 10
    assert plain + 4 < calibrated < dense


@pytest.mark.slow
@pytest.mark.gpu
@CUDA
def test_batches_never_make_the_cpu_wait_for_the_gpu(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", coloured(48, 8))
    images = load_images(tmp_path, "train")
    config = PhotographConfig(sizes=(8,), workers=0)
    both = (
        TrainBatches(images, 16, device="cuda"),
        PhotographBatches(load_photographs(tmp_path, "train"), 16, config, 2, device="cuda"),
    )
    for batches in both:
        list(batches.epoch(0))  # constants are sent once
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = list(batches.epoch(1))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(found) == 3
        assert found[0][0].is_cuda


WEIGHTS = sorted(Path(__file__).parents[1].glob("benchmarks/weights/*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("file", WEIGHTS, ids=lambda file: file.stem)
def test_the_weights_that_are_kept_are_those_of_the_results(file):
    images = Path(Folders.from_environment().data) / "cifar10"
    if not images.is_dir():
        pytest.skip("needs RANKPRUNE_DATA with cifar10/")
    result = json.loads((file.parents[1] / "results" / f"{file.stem}.json").read_text())
    test = load_images(images, "test")
    if test.digest != result["test_digest"]:
        pytest.skip("these are other images")
    model = build(result["model"], len(test.classes))
    load_exactly(model, read_tensors(file), str(file))
    assert top1(model, eval_batches(test)) == pytest.approx(result["top1"], abs=0.02)
