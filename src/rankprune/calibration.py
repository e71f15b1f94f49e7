"""Activation-aware truncation: input covariances of layers, gathered by running the model on calibration inputs."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.cost import Inputs, call, check_batches, uncompiled
from rankprune.errors import RankPruneError
from rankprune.linalg import Whitening, whitening
from rankprune.schemes import Scheme

Whitenings = dict[tuple[str, str], Whitening]
"""By (layer name, scheme name). Layers that a scheme sees no patches for (transposed convolutions) are absent."""


@torch.no_grad()
def whitenings(
    model: nn.Module, layers: Mapping[tuple[str, str], tuple[nn.Module, Scheme[Any]]], inputs: Iterable[Inputs]
) -> Whitenings:
    """Run the model on all inputs, in eval mode and left as it was, and whiten each layer's input as each scheme sees it.

    The spatial scheme takes columns of pixels to be uncorrelated with their neighbours, the decoupled one single pixels; for
    channel and linear the covariance is exact.

    Raises:
        RankPruneError: if there are no inputs, or they are one tensor or dict instead of several.
    """
    check_batches(inputs)
    sums: dict[tuple[str, str], Tensor] = {}

    def gather(key: tuple[str, str], scheme: Scheme[Any]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            patches = scheme.input_patches(module, x)
            if patches is not None:
                patches = patches.double()
                sums[key] = sums.get(key, 0) + patches.mT @ patches / patches.shape[1]

        return hook

    batches = 0
    with ExitStack() as stack:
        stack.enter_context(uncompiled(model))
        for key, (module, scheme) in layers.items():
            stack.callback(module.register_forward_pre_hook(gather(key, scheme), with_kwargs=True).remove)
        for x in inputs:
            call(model, x)
            batches += 1
    if not batches:
        raise RankPruneError("calibration= holds no inputs; give a list of batches (an iterator is empty after its first use)")
    return {key: whitening(total / batches, layers[key][1].input_on_rows, key[0]) for key, total in sums.items()}
