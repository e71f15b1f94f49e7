"""What a scheme is: a weight seen as a stack of matrices, and two stock layers made from factors of those matrices.

Throughout, a layer maps c input channels to n output channels in g groups with kernel k1 x ... x kd. Its *grouped* weight
has shape (g, n/g, c/g, k1, ..., kd), whether the layer is a convolution or a transposed one.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd as Convolution

from rankprune.wrappers import own_type

L = TypeVar("L", bound=nn.Module)

Key = tuple[str, str]
"""A layer's name and a scheme's, which its matrices under that scheme are known by."""

CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.Conv1d,
    nn.Conv2d: nn.Conv2d,
    nn.Conv3d: nn.Conv3d,
    nn.ConvTranspose1d: nn.Conv1d,
    nn.ConvTranspose2d: nn.Conv2d,
    nn.ConvTranspose3d: nn.Conv3d,
}
"""The convolution types, each with the ordinary convolution of the same dimension."""


class Scheme(ABC, Generic[L]):
    """Maps a layer's weight to a stack of matrices and back, and builds the pair of layers for given factors.

    A scheme holds no state. All matrices of a layer's stack share one rank.
    """

    name: ClassVar[str]
    input_on_rows: ClassVar[bool]
    """Whether the side of the matrices that faces the layer's input is that of the rows."""

    @abstractmethod
    def unsupported(self, layer: nn.Module) -> str | None:
        """Why this scheme cannot express `layer`, or None where it can."""

    def repeats(self, layer: L) -> bool:
        """Whether another scheme makes of `layer` the same at no more cost, so that ``"auto"`` need not look at this one."""
        return False

    @abstractmethod
    def to_matrices(self, layer: L, weight: Tensor) -> Tensor:
        """The weight as a stack of matrices, shape (stack, rows, columns)."""

    @abstractmethod
    def to_weight(self, layer: L, matrices: Tensor) -> Tensor:
        """The inverse of to_matrices: (stack, rows, columns) -> the shape of layer.weight."""

    def full_rank(self, layer: L) -> int:
        """The largest rank, k: the smaller side of its matrices."""
        weight = torch.empty(layer.get_parameter("weight").shape, device="meta")
        return min(self.to_matrices(layer, weight).shape[1:])

    @abstractmethod
    def empty_pair(self, layer: L, rank: int) -> nn.Sequential:
        """Two stock layers of rank `rank` in the place of `layer`, weights uninitialised, on its device and dtype."""

    @abstractmethod
    def pair_weights(self, layer: L, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Factors left (stack, rows, r) and right (stack, r, columns) -> the weights of the two layers, in order."""

    @abstractmethod
    def input_patches(self, layer: L, x: Tensor) -> Tensor | None:
        """What the input-facing side of the matrices is multiplied with when `layer` runs on `x`.

        Shapes: x as the layer is called with -> (matrices, samples, input-facing size), where one may be for several of the
        stack that follow one another, or for all; None where the layer does not multiply patches of its input (transposed
        convolutions).
        """

    def pair_like(self, layer: L, rank: int) -> nn.Sequential:
        """empty_pair with the memory format, mode and requires_grad of `layer`; the bias is its second half's."""
        pair, dense = self.empty_pair(layer, rank), layer.get_parameter("weight")
        for half in pair:
            weight = half.get_parameter("weight").requires_grad_(dense.requires_grad)
            if is_channels_last(dense):
                weight.data = weight.data.contiguous(memory_format=CHANNELS_LAST[dense.dim()])
        if layer.bias is not None:
            pair[1].get_parameter("bias").requires_grad_(layer.get_parameter("bias").requires_grad)
        return pair.train(layer.training)

    def pair(self, layer: L, left: Tensor, right: Tensor) -> nn.Sequential:
        """Two stock layers that compute what `layer` would with the weight ``to_weight(left @ right)``.

        The pair takes over the layer's bias, device, dtype, memory format, mode and requires_grad.

        Shapes: left (stack, rows, r), right (stack, r, columns).
        """
        pair = self.pair_like(layer, left.shape[-1])
        with torch.no_grad():
            for half, weight in zip(pair, self.pair_weights(layer, left, right), strict=True):
                half.get_parameter("weight").copy_(weight)
            if layer.bias is not None:
                pair[1].get_parameter("bias").copy_(layer.get_parameter("bias"))
        return pair


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format in which channels come last, by the number of a tensor's axes."""


def is_channels_last(weight: Tensor) -> bool:
    """Whether it lies in memory in channels_last order (in three dimensions channels_last_3d), and in that alone."""
    order = CHANNELS_LAST.get(weight.dim())
    return order is not None and not weight.is_contiguous() and weight.is_contiguous(memory_format=order)


class ConvolutionScheme(Scheme[Convolution]):
    """A scheme for convolutions and transposed convolutions of any dimension."""

    def unsupported(self, layer: nn.Module) -> str | None:
        return None if own_type(layer) in CONVOLUTIONS else f"{type(layer).__name__} is not a convolution"


def to_grouped(layer: Convolution, weight: Tensor) -> Tensor:
    """The weight of a convolution -> (g, n/g, c/g, k1, ..., kd)."""
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2) if layer.transposed else grouped


def from_grouped(layer: Convolution, grouped: Tensor) -> Tensor:
    """The inverse of to_grouped."""
    return (grouped.transpose(1, 2) if layer.transposed else grouped).flatten(0, 1)


def conv_like(
    layer: Convolution, in_channels: int, out_channels: int, *, groups: int, axes: range, bias: bool = False
) -> nn.Module:
    """A stock convolution that treats the kernel axes in `axes` as `layer` does and is 1 wide along all others.

    Stride, dilation, padding (numbers, 'same' or 'valid', any padding_mode) and output_padding follow their axis, so two such
    layers with complementary `axes` together cover the geometry of `layer`. With no axes it is a pointwise convolution.
    """

    def along(values: tuple[int, ...], elsewhere: int) -> tuple[int, ...]:
        return tuple(v if axis in axes else elsewhere for axis, v in enumerate(values))

    kind = own_type(layer)
    keywords = {}
    if not axes:
        kind = CONVOLUTIONS[kind]
    elif layer.transposed:
        keywords["output_padding"] = along(layer.output_padding, 0)
    padding = layer.padding if isinstance(layer.padding, str) else along(layer.padding, 0)
    return nn.utils.skip_init(
        kind,
        in_channels,
        out_channels,
        kernel_size=along(layer.kernel_size, 1),
        stride=along(layer.stride, 1),
        padding=padding if axes else 0,
        dilation=along(layer.dilation, 1),
        groups=groups,
        bias=bias,
        padding_mode=layer.padding_mode if axes else "zeros",
        device=layer.weight.device,
        dtype=layer.weight.dtype,
        **keywords,
    )


def patches(layer: Convolution, x: Tensor, axes: range) -> Tensor | None:
    """The windows of `x` under the kernel axes in `axes`, at every position along all others.

    Shapes: (b, c, ...) or (c, ...) -> (g, samples, c/g * kernel sizes); None for transposed convolutions.
    """
    if layer.transposed:
        return None
    spatial = len(layer.kernel_size)
    x = x.detach() if x.dim() == spatial + 2 else x.detach()[None]
    sides = [side if (2 * spatial - 1 - i) // 2 in axes else 0 for i, side in enumerate(padded_sides(layer))]
    x = F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    for axis in axes:
        size, dilation = layer.kernel_size[axis], layer.dilation[axis]
        x = x.unfold(2 + axis, (size - 1) * dilation + 1, layer.stride[axis])[..., ::dilation]
    x = x.unflatten(1, (layer.groups, -1))  # (b, g, c/g, positions ..., kernel sizes ...)
    order = (1, 0, *range(3, 3 + spatial), 2, *range(3 + spatial, x.dim()))
    return x.permute(order).flatten(2 + spatial).flatten(1, 1 + spatial)


def padded_sides(layer: Convolution) -> list[int]:
    """The padding of both sides of each axis, the last one first, as torch.nn.functional.pad takes it."""
    if layer.padding == "same":
        totals = [dilation * (size - 1) for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    numbers = [0] * len(layer.kernel_size) if isinstance(layer.padding, str) else layer.padding
    return [side for side in reversed(numbers) for _ in range(2)]


def kernel_axes(layer: Convolution) -> range:
    """The indices of a convolution's kernel axes, 0 to d - 1."""
    return range(len(layer.kernel_size))
