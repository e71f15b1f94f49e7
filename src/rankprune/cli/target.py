"""The user's own model on the command line: ``package.module:callable``, a checkpoint or an artefact, an input shape."""

import importlib
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from rankprune.checkpoint import load
from rankprune.cli.console import say
from rankprune.errors import RankPruneError
from rankprune.passes import undisturbed
from rankprune.state_dicts import load_exactly, read_tensors


def build_model(spec: str, checkpoint: Path | None = None, artefact: Path | None = None) -> nn.Module:
    """Call ``package.module:callable`` for a model in eval mode, and load a checkpoint or the artefact of a decomposed one.

    The module is found as Python finds it, the working directory included.

    Raises:
        RankPruneError: if there is no such module or callable, it returns no model, or the file does not fit.
    """
    module_name, _, attribute = spec.partition(":")
    if not attribute or not module_name:
        raise RankPruneError(f"--model {spec!r}: write it as package.module:callable, like rankprune.recipes.resnet:resnet20")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RankPruneError(
            f"--model {spec!r}: cannot import {module_name!r} ({error}); is it in the working directory?"
        ) from error
    except Exception as error:  # the user's own code can raise anything
        raise RankPruneError(f"--model {spec!r}: importing {module_name!r} raised {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise RankPruneError(f"--model {spec!r}: {module_name!r} has no {attribute!r}")
    build = getattr(module, attribute)
    try:
        model = build if isinstance(build, nn.Module) else build()
    except Exception as error:
        raise RankPruneError(
            f"--model {spec!r} raised {type(error).__name__}: {error}; it is called without arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise RankPruneError(f"--model {spec!r} gives a {type(model).__name__}, not a torch.nn.Module")
    if checkpoint is not None and artefact is not None:
        raise RankPruneError("give either --checkpoint, for a dense model, or --artefact, for a decomposed one")
    if checkpoint is not None:
        load_exactly(model, read_tensors(checkpoint, model), str(checkpoint))
    if artefact is not None:
        model = load(artefact, model)
    model.eval()
    return model


def tell_untrained(spec: str, *files: Path | None) -> None:
    """Say that a model without a checkpoint or artefact has the weights that its builder gave it, random ones often."""
    if not any(files):
        say(f"weights  as {spec} makes them; --checkpoint loads others")


def example_input(shape: str, model: nn.Module) -> Tensor:
    """A tensor of random values of the shape in a text like ``1,3,32,32``; with ``int:`` before it, of integers 0 and 1.

    Values are of the dtype that the model's weights have, and on their device.

    Raises:
        RankPruneError: for anything else, and if the model does not run on it.
    """
    x = _random(shape).to(device_of(model))
    if x.is_floating_point():
        x = x.to(dtype_of(model))
    try:
        with undisturbed(model):
            model(x)
    except Exception as error:
        raise RankPruneError(f"the model does not run on --input {shape} ({type(error).__name__}: {error})") from error
    return x


def dtype_of(model: nn.Module) -> torch.dtype:
    """That of its first weights."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def device_of(model: nn.Module) -> torch.device:
    """That of its first weights."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _random(shape: str) -> Tensor:
    numbers = shape.removeprefix("int:")
    try:
        sizes = [int(n) for n in numbers.replace("x", ",").split(",")]
        if min(sizes) < 1:
            raise ValueError
    except ValueError as error:
        raise RankPruneError(
            f"--input {shape!r}: give the shape of one batch, like 1,3,224,224 (or int:1,128 for tokens)"
        ) from error
    generator = torch.Generator().manual_seed(0)
    if numbers != shape:
        return torch.randint(2, sizes, generator=generator)
    return torch.randn(sizes, generator=generator)
