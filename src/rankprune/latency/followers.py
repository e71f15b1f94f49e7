"""What runtimes fuse with a layer: the BatchNorm and activation behind it."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from rankprune.cost import Inputs, call, undisturbed

_FUSED = (BatchNorm, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid)


def followers(model: nn.Module, x: Inputs, layers: Mapping[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """Copies of the BatchNorm and activation modules that take up each layer's output as it is, in order."""
    tails: dict[str, list[nn.Module]] = {name: [] for name in layers}
    made_by: dict[int, str] = {}
    outputs: list[Tensor] = []  # kept, or another tensor could get the same id
    handles = []

    def made(output: Any, name: str) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)
            made_by[id(output)] = name

    def follow(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = made_by.pop(id(args[0]), None) if args else None
        if name is not None:
            if module not in tails[name]:
                tails[name].append(module)
            made(output, name)

    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(lambda m, args, output, name=name: made(output, name)))
    handles += [m.register_forward_hook(follow) for m in model.modules() if isinstance(m, _FUSED)]
    try:
        with undisturbed(model):
            call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: [copy.deepcopy(m) for m in tail] for name, tail in tails.items()}
