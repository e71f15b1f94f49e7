"""The recipes' networks by name, and where their weights come from."""

from pathlib import Path

import torch
from torch import Tensor, nn

from rankprune.errors import MissingExtraError, RankPruneError
from rankprune.recipes import imagenet_resnet
from rankprune.recipes.resnet import DEPTHS, resnet
from rankprune.state_dicts import load_exactly, read_tensors

IMAGENET = {"resnet18": imagenet_resnet.resnet18, "resnet50": imagenet_resnet.resnet50}
RUN, TORCHVISION, TIMM = "run:", "torchvision:", "timm:"
WEIGHTS, CHECKPOINT = "dense.safetensors", "checkpoint.pt"
"""In the folder of a run: the weights before decomposition, written when it ends, and what it goes on from."""


def build(name: str, classes: int) -> nn.Module:
    """A fresh network, its convolutions in channels_last order: a CIFAR ResNet or one of IMAGENET.

    Raises:
        RankPruneError: for a name that is none of them.
    """
    names = [*(f"resnet{depth}" for depth in DEPTHS), *IMAGENET]
    if name not in names:
        raise RankPruneError(f"unknown model {name!r}; choose one of {', '.join(names)}")
    made = IMAGENET[name](classes) if name in IMAGENET else resnet(name, classes)
    nn.utils.convert_conv2d_weight_memory_format(made, torch.channels_last)
    return made


def load_weights(model: nn.Module, source: str, models: Path, runs: Path) -> None:
    """Fill `model` with the weights in `source`, all of them, in float32.

    Args:
        source: ``"run:NAME"``, the dense weights that an experiment ended with; pretrained ones that a package downloads once,
            ``"torchvision:ResNet18_Weights.IMAGENET1K_V1"`` or ``"timm:resnet18.tv_in1k"``; or a file.
        models: the folder that files are in.
        runs: the folder that runs are in.

    Raises:
        RankPruneError: if there is no such run, package or set of weights.
        CheckpointError: if the weights do not fit.
    """
    file = weights_file(source, models, runs)
    if file is not None:
        if source.startswith(RUN) and not file.is_file():
            raise RankPruneError(f"{source!r}: {str(file)!r} is not there; run that experiment first")
        tensors = read_tensors(file, model)
    elif source.startswith(TORCHVISION):
        tensors = _torchvision(source.removeprefix(TORCHVISION))
    else:
        tensors = _timm(source.removeprefix(TIMM))
    load_exactly(model, {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, source)


def weights_file(source: str, models: Path, runs: Path) -> Path | None:
    """The file of a source, there or not; None for those that a package downloads."""
    if source.startswith((TORCHVISION, TIMM)):
        return None
    return runs / source.removeprefix(RUN) / WEIGHTS if source.startswith(RUN) else models / source


def _torchvision(name: str) -> dict[str, Tensor]:
    try:
        from torchvision.models import get_weight
    except ImportError as error:
        raise MissingExtraError("torchvision", "imagenet") from error
    try:
        return dict(get_weight(name).get_state_dict(progress=False, check_hash=True))
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:  # unknown names, no network, a damaged download
        raise RankPruneError(f"cannot get the weights {name!r} from torchvision: {error}") from error


def _timm(name: str) -> dict[str, Tensor]:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "imagenet") from error
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except (RuntimeError, OSError) as error:
        raise RankPruneError(f"cannot get the weights {name!r} from timm: {error}") from error
