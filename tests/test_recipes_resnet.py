import pytest
import torch

import rankprune as rp
from rankprune.recipes import resnet as cifar
from rankprune.recipes.imagenet_resnet import resnet18, resnet50
from rankprune.recipes.resnet import DEPTHS

torchvision = pytest.importorskip("torchvision.models", exc_type=Exception)


@pytest.mark.parametrize(("ours", "theirs"), [(resnet18, "resnet18"), (resnet50, "resnet50")])
def test_torchvisions_weights_fit_and_compute_the_same(ours, theirs) -> None:
    torch.manual_seed(0)
    reference = getattr(torchvision, theirs)(weights=None).eval()
    model = ours().eval()
    model.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model(x), reference(x), rtol=1e-4, atol=1e-4)


def test_known_sizes() -> None:
    x = torch.zeros(1, 3, 224, 224)
    small, large = rp.count(resnet18(), x), rp.count(resnet50(), x)
    assert (small.params, large.params) == (11_689_512, 25_557_032)
    assert small.macs == pytest.approx(1.814e9, rel=1e-3)
    assert large.macs == pytest.approx(4.089e9, rel=1e-3)


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_depth_has_a_builder_for_the_command_line(depth: int) -> None:
    built = getattr(cifar, f"resnet{depth}")()
    assert built.state_dict().keys() == cifar.resnet(f"resnet{depth}").state_dict().keys()
