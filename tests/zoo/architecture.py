"""What the zoo knows of an architecture, and random weights that let mistakes show."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd as Convolution

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A network and what to call it with.

    Args:
        library: the package it comes from; ``"torch"`` for those written here.
        task: what the network is for.
        build: makes the network.
        inputs: makes what the network is called with, always the same.
        generates: whether it has ``generate()``.
        tied: whether two of its modules share a parameter.
        fast: whether ``make test`` looks at it too.
        exclude: layers to leave alone, for other code reads their weights where a run on the inputs does not show it.
        scheme: for its convolutions; "channel" where the spatial one means minutes of SVDs.
    """

    name: str
    library: str
    task: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    generates: bool = False
    tied: bool = False
    fast: bool = False
    exclude: tuple[str, ...] = ()
    scheme: str = "auto"

    def model(self) -> nn.Module:
        """The network in eval mode, with random weights, always the same."""
        torch.manual_seed(0)
        model = self.build().eval()
        _randomize(model, self.inputs())
        return model


def outputs(model: nn.Module, x: Inputs) -> list[Tensor]:
    """The floating-point tensors in what the network returns."""
    return list(_tensors(_call(model, x)))


@torch.no_grad()
def run(model: nn.Module, x: Inputs) -> list[Tensor]:
    """outputs() without a graph."""
    return outputs(model, x)


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference between two runs' outputs, relative to the largest entry of each wanted tensor."""
    pairs = zip(found, wanted, strict=True)
    return float(torch.stack([((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).double() for a, b in pairs]).max())


def noise(*shape: int) -> Callable[[], Tensor]:
    """Makes a tensor of normal noise, always the same."""
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ids(batch: int, length: int, vocabulary: int) -> Tensor:
    """Tokens from 3 on, for the first ones tend to be special."""
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def _call(model: nn.Module, x: Inputs) -> Any:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Those in tensors, tuples, lists and dicts, however nested; caches of attention are of other types."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, Mapping | tuple | list):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


@torch.no_grad()
def _randomize(model: nn.Module, x: Inputs) -> None:
    """Weights under which every layer matters to the output and has a spectrum that decays.

    As built, many networks end in a layer of zeros, scale their branches by 1e-6, or have activations that vanish.
    """
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool(parameter.min() == parameter.max()):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    hooks = []
    for module in model.modules():
        weight = dict(module._parameters.items()).get("weight")
        if weight is not None and (isinstance(module, nn.Linear | Convolution) or type(module).__name__ == "Conv1D"):
            inputs = 1 if isinstance(module, nn.Linear) or not getattr(module, "transposed", True) else 0
            _fill(weight, inputs)
        if isinstance(getattr(module, "running_var", None), Tensor):
            hooks.append(module.register_forward_pre_hook(_take_statistics))
    _call(model, x)
    for hook in hooks:
        hook.remove()


def _fill(weight: Tensor, inputs: int) -> None:
    """Normal noise of variance 1 / fan-in, of which some inputs get more than others; `inputs` is their axis."""
    count = weight.shape[inputs]
    shares = 1 / (1 + 16 * torch.randperm(count) / count)
    shares *= (weight.shape[1 - inputs] / weight.numel() / shares.square().mean()).sqrt()
    weight.copy_(torch.randn(weight.shape) * shares.view(-1, *[1] * (weight.dim() - 1 - inputs)))


def _take_statistics(norm: Any, args: tuple[Tensor, ...]) -> None:
    """Set a BatchNorm's running statistics, all channels alike, so that its output has mean 0 and variance 1."""
    norm.running_mean.fill_(args[0].mean())
    norm.running_var.fill_(args[0].var())
