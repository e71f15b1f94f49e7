"""Activation-aware truncation: input covariances of layers, gathered by running the model on calibration inputs."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.errors import RankPruneError
from rankprune.inputs import Inputs, check_batches, cloned, tried
from rankprune.linalg import eigen, in_parts
from rankprune.passes import uncompiled
from rankprune.schemes import Key, Scheme

_HELD = 2**28
"""How many values the covariances that are gathered together have at most; each takes 24 bytes in the end."""
_UNROLLED = 2**24
"""How many values the windows under a kernel have at most that are looked at together; each takes 12 bytes."""

Layers = Mapping[Key, tuple[nn.Module, Scheme[Any]]]
"""Modules and schemes by (layer name, scheme name)."""


@dataclass(frozen=True)
class Whitening:
    """The square root of an input covariance and its inverse, (matrices, size, size) float64, for one side of a stack.

    Where there are fewer than matrices in the stack, each is for as many that follow one another.

    Truncating the whitened stack loses the least energy in the layer's *output*, instead of in its weight (as in SVD-LLM).
    """

    root: Tensor
    inverse: Tensor
    on_rows: bool

    def apply(self, stack: Tensor) -> Tensor:
        """(stack, rows, columns) -> the same in float64, whitened on the side that faces the input."""
        root = _for_each(self.root, stack)
        return root @ stack.double() if self.on_rows else stack.double() @ root

    def undo(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of a whitened stack -> of the stack itself, none much larger than the other, as linalg.factors has them.

        Shapes: (stack, rows, r), (stack, r, columns).
        """
        inverse = _for_each(self.inverse, left)
        left, right = (inverse @ left, right) if self.on_rows else (left, right @ inverse)
        norms = left.norm(dim=(-2, -1), keepdim=True), right.norm(dim=(-2, -1), keepdim=True)
        scale = torch.where(norms[0] * norms[1] > 0, norms[1] / norms[0], 1.0).sqrt()
        return left * scale, right / scale


def _for_each(matrices: Tensor, stack: Tensor) -> Tensor:
    """Each of the matrices, which may be one for all, as often as there are matrices in the stack that it is for."""
    return matrices if len(matrices) == 1 else matrices.repeat_interleave(len(stack) // len(matrices), 0)


Whitenings = dict[Key, Whitening]
"""By (layer name, scheme name). Absent are layers of which a scheme sees no patches (transposed ones), or that got none."""


def whitenings(model: nn.Module, layers: Layers, inputs: Iterable[Inputs]) -> Iterator[tuple[list[Key], Whitenings]]:
    """Run the model on all inputs, in eval mode and left as it was, and whiten each layer's input as each scheme sees it.

    The spatial scheme takes columns of pixels to be uncorrelated with their neighbours, the decoupled one single pixels; for
    channel and linear the covariance is exact.

    Yields:
        Some of the layers, and what is known of them: so that large models need not have all covariances in memory at once. The
        model runs on all inputs for each such part.

    Raises:
        RankPruneError: if there are no inputs, they are one tensor or dict instead of several, or a layer's is not finite.
    """
    check_batches(inputs)
    parts = list(in_parts({key: _values(*layer) for key, layer in layers.items()}, _HELD))
    if len(parts) > 1 and isinstance(inputs, Iterator):
        inputs = list(inputs)
    for part in parts:
        yield part, _whitenings(model, {key: layers[key] for key in part}, inputs)


def _values(module: nn.Module, scheme: Scheme[Any]) -> int:
    """How many a layer's covariance has."""
    weight = module.get_parameter("weight")
    _, rows, columns = scheme.to_matrices(module, torch.empty_like(weight, device="meta")).shape
    return getattr(module, "groups", 1) * (rows if scheme.input_on_rows else columns) ** 2


@torch.no_grad()
def _whitenings(model: nn.Module, layers: Layers, inputs: Iterable[Inputs]) -> Whitenings:
    sums: dict[Key, Tensor] = {}
    samples: dict[Key, int] = defaultdict(int)

    def gather(key: Key, scheme: Scheme[Any]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            for part in _in_few_values(module, x):
                patches = scheme.input_patches(module, part)
                if patches is not None:
                    patches = patches.double()
                    sums[key] = sums.get(key, 0) + patches.mT @ patches
                    samples[key] += patches.shape[1]

        return hook

    empty = True
    with ExitStack() as stack:
        stack.enter_context(uncompiled(model))
        for key, (module, scheme) in layers.items():
            stack.callback(module.register_forward_pre_hook(gather(key, scheme), with_kwargs=True).remove)
        for x in inputs:
            tried(model, cloned(x), "these calibration inputs", "leave out what else a loader gives: (x for x, _ in loader)")
            empty = False
    if empty:
        raise RankPruneError("calibration= holds no inputs; give a list of batches (an iterator is empty after its first use)")
    means = {key: total / samples[key] for key, total in sums.items() if total.any()}
    return {key: _whitening(mean, layers[key][1].input_on_rows, key[0]) for key, mean in means.items()}


def _in_few_values(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """A layer's input in parts of as many examples as unrolled have at most _UNROLLED values; at least one each."""
    kernel = getattr(module, "kernel_size", ())
    if x.dim() != len(kernel) + 2 or not kernel:  # of Linear layers nothing is unrolled
        return (x,)
    if not x.numel():  # as where a detector has found nothing
        return ()
    return x.split(max(1, _UNROLLED // max(1, x[0].numel() * math.prod(kernel))))


def whitened(stacks: Mapping[Key, Tensor], whites: Whitenings) -> dict[Key, Tensor]:
    """Stacks by (layer name, scheme name), those whitened that there is a Whitening for."""
    return {key: whites[key].apply(stack) if key in whites else stack for key, stack in stacks.items()}


@torch.no_grad()
def _whitening(covariance: Tensor, on_rows: bool, name: str) -> Whitening:
    """The Whitening of an input covariance (matrices, size, size).

    Directions with less than 1e-6 of the mean variance count as having that much, so that the root can be inverted.

    Raises:
        RankPruneError: naming the layer, if the covariance is not finite.
    """
    if not covariance.isfinite().all():
        raise RankPruneError(
            f"the input of layer {name!r} holds NaN or infinite values on these calibration inputs; look for them in the "
            "inputs, or, if the model is in half precision, calibrate in float32"
        )
    values, vectors = eigen(covariance.double())
    floor = 1e-6 * values.mean(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    roots = values.maximum(floor).sqrt()
    return Whitening((vectors * roots[..., None, :]) @ vectors.mT, (vectors / roots[..., None, :]) @ vectors.mT, on_rows)
