"""What runtimes fuse with a layer: the BatchNorm and activation behind it."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.overrides import TorchFunctionMode

from rankprune.inputs import Inputs, call
from rankprune.passes import uncompiled

_ACTIVATIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    Tensor.relu: nn.ReLU,
    Tensor.relu_: nn.ReLU,
    F.relu6: nn.ReLU6,
    F.hardtanh: nn.Hardtanh,  # which nn.ReLU6 is, too
    F.leaky_relu: nn.LeakyReLU,
    F.silu: nn.SiLU,
    F.gelu: nn.GELU,
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
}
"""The functions that models call, directly or by a module, with the module that takes the same further arguments."""


def followers(model: nn.Module, x: Inputs, layers: Mapping[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """The BatchNorms and activations, as copies, that take up each layer's output as it is, in order.

    They end where two of them take up the same tensor. Of a layer that runs more than once they are those of its first call.
    """
    chains = _Chains()
    handles = [
        layer.register_forward_hook(lambda m, args, output, name=name: chains.begin(name, output))
        for name, layer in layers.items()
    ]
    handles += [
        norm.register_forward_hook(lambda m, args, output: chains.follow(lambda: m, args, output))
        for norm in model.modules()
        if isinstance(norm, BatchNorm)
    ]
    try:
        with uncompiled(model), _Watched(chains):
            call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: [copy.deepcopy(m) for m in chains.of(name)] for name in layers}


class _Chains:
    """Behind each layer what has taken up its output, told of each call in order."""

    def __init__(self) -> None:
        self._tails: dict[str, list[nn.Module]] = {}
        self._ends: dict[str, int] = {}
        self._made_by: dict[int, tuple[str, int]] = {}
        """By the id of a tensor: the layer, and how many of its followers the tensor has passed."""
        self._outputs: list[Tensor] = []  # kept, or another tensor could get the same id

    def of(self, name: str) -> list[nn.Module]:
        return self._tails.get(name, [])[: self._ends.get(name)]

    def begin(self, name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            self._made_by.pop(id(output), None)
        if name not in self._tails:
            self._tails[name] = []
            self._made(output, name, 0)

    def follow(self, module: Callable[[], nn.Module], args: tuple[Any, ...], output: Any) -> None:
        name, passed = self._made_by.get(id(args[0]), ("", 0)) if args else ("", 0)
        if not name:
            return
        if passed < len(self._tails[name]):  # something else has taken it up
            self._ends[name] = min(passed, self._ends.get(name, passed))
        else:
            self._tails[name].append(module())
            self._made(output, name, passed + 1)

    def _made(self, output: Any, name: str, passed: int) -> None:
        if isinstance(output, Tensor):
            self._outputs.append(output)
            self._made_by[id(output)] = name, passed


class _Watched(TorchFunctionMode):
    """Within, chains are told of activations."""

    def __init__(self, chains: _Chains) -> None:
        super().__init__()
        self._chains = chains

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if (activation := _ACTIVATIONS.get(func)) is not None:
            self._chains.follow(lambda: activation(*args[1:], **kwargs), args, output)
        return output
