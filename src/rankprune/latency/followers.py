"""What runtimes fuse with a layer: the BatchNorm and activation behind it."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from rankprune.cost import Inputs, call, undisturbed

_FUSED = (BatchNorm, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid)


def followers(model: nn.Module, x: Inputs, layers: Mapping[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """Copies of the BatchNorm and activation modules that take up each layer's output as it is, in order.

    They end where two of them take up the same tensor. Of a layer that runs more than once they are those of its first call.
    """
    tails: dict[str, list[nn.Module]] = {}
    made_by: dict[int, tuple[str, int]] = {}
    """By the id of a tensor: the layer, and how many of its followers the tensor has passed."""
    ends: dict[str, int] = {}
    outputs: list[Tensor] = []  # kept, or another tensor could get the same id
    handles = []

    def made(output: Any, name: str, passed: int) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)
            made_by[id(output)] = name, passed

    def begin(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            made_by.pop(id(output), None)
        if name not in tails:
            tails[name] = []
            made(output, name, 0)

    def follow(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name, passed = made_by.get(id(args[0]), ("", 0)) if args else ("", 0)
        if not name:
            return
        if passed < len(tails[name]):  # something else has taken it up
            ends[name] = min(passed, ends.get(name, passed))
        else:
            tails[name].append(module)
            made(output, name, passed + 1)

    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(lambda m, args, output, name=name: begin(name, output)))
    handles += [m.register_forward_hook(follow) for m in model.modules() if isinstance(m, _FUSED)]
    try:
        with undisturbed(model):
            call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: [copy.deepcopy(m) for m in tails.get(name, [])[: ends.get(name)]] for name in layers}
