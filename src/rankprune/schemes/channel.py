"""Channel-wise decomposition (Zhang et al. 2015): a kernel of the full size onto r channels, then a pointwise one."""

from torch import Tensor, nn

from rankprune.schemes.base import Convolution, ConvolutionScheme, conv_like, from_grouped, kernel_axes, patches, to_grouped


class Channel(ConvolutionScheme):
    """One matrix (n/g, c/g * k1 * ... * kd) per group."""

    name = "channel"
    input_on_rows = False

    def input_patches(self, layer: Convolution, x: Tensor) -> Tensor | None:
        return patches(layer, x, kernel_axes(layer))

    def to_matrices(self, layer: Convolution, weight: Tensor) -> Tensor:
        return to_grouped(layer, weight).flatten(2)

    def to_weight(self, layer: Convolution, matrices: Tensor) -> Tensor:
        return from_grouped(layer, matrices.unflatten(2, (-1, *layer.kernel_size)))

    def empty_pair(self, layer: Convolution, rank: int) -> nn.Sequential:
        g, axes = layer.groups, kernel_axes(layer)
        return nn.Sequential(
            conv_like(layer, layer.in_channels, g * rank, groups=g, axes=axes),
            conv_like(layer, g * rank, layer.out_channels, groups=g, axes=axes[:0], bias=layer.bias is not None),
        )

    def pair_weights(self, layer: Convolution, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        first = from_grouped(layer, right.unflatten(2, (-1, *layer.kernel_size)))  # grouped: (g, r, c/g, k1, ..., kd)
        second = left.flatten(0, 1).reshape(layer.out_channels, -1, *[1] * len(layer.kernel_size))  # (n, r, 1, ..., 1)
        return first, second
