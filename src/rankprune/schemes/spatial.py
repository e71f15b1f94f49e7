"""Spatial decomposition (Jaderberg et al. 2014): k x 1 onto r channels, then 1 x k."""

from torch import Tensor, nn

from rankprune.schemes.base import Convolution, ConvolutionScheme, conv_like, from_grouped, kernel_axes, patches, to_grouped


class Spatial(ConvolutionScheme):
    """One matrix (k1 * c/g, n/g * k2 * ... * kd) per group: the first kernel axis is split from all others.

    In one dimension there is nothing else to split from: the second layer is then pointwise. Rows run over the input channels
    fastest and lie one beside the other in memory, as in a channels_last weight, so that such a weight is copied in long runs.
    """

    name = "spatial"
    input_on_rows = True

    def repeats(self, layer: Convolution) -> bool:
        """Where the kernel is 1 wide along all axes but the first these are the matrices of the channel scheme.

        That one treats these axes in its first layer, and is the dearer one where they grow by it.
        """
        others = kernel_axes(layer)[1:]
        if layer.transposed:
            grows = any(layer.stride[i] > 1 or layer.output_padding[i] for i in others)
        else:
            grows = not isinstance(layer.padding, str) and any(layer.padding[i] for i in others)
        return not grows and all(layer.kernel_size[i] == 1 for i in others)

    def input_patches(self, layer: Convolution, x: Tensor) -> Tensor | None:
        found = patches(layer, x, kernel_axes(layer)[:1])  # (g, samples, c/g * k1)
        return None if found is None else found.unflatten(2, (-1, layer.kernel_size[0])).transpose(2, 3).flatten(2)

    def to_matrices(self, layer: Convolution, weight: Tensor) -> Tensor:
        grouped = to_grouped(layer, weight).flatten(4) if len(layer.kernel_size) > 1 else to_grouped(layer, weight)[..., None]
        return grouped.permute(0, 1, 4, 3, 2).flatten(3).flatten(1, 2).mT  # from (g, n/g, c/g, k1, k2 * ... * kd)

    def to_weight(self, layer: Convolution, matrices: Tensor) -> Tensor:
        k1, *rest = layer.kernel_size
        n = layer.out_channels // layer.groups
        grouped = matrices.unflatten(2, (n, -1)).unflatten(1, (k1, -1)).permute(0, 3, 2, 1, 4)
        return from_grouped(layer, grouped.unflatten(4, rest) if rest else grouped.squeeze(4))

    def empty_pair(self, layer: Convolution, rank: int) -> nn.Sequential:
        g, axes = layer.groups, kernel_axes(layer)
        return nn.Sequential(
            conv_like(layer, layer.in_channels, g * rank, groups=g, axes=axes[:1]),
            conv_like(layer, g * rank, layer.out_channels, groups=g, axes=axes[1:], bias=layer.bias is not None),
        )

    def pair_weights(self, layer: Convolution, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        k1, *rest = layer.kernel_size
        n = layer.out_channels // layer.groups
        first = left.unflatten(1, (k1, -1)).permute(0, 3, 2, 1)  # (g, r, c/g, k1)
        second = right.unflatten(2, (n, -1)).transpose(1, 2)  # (g, n/g, r, k2 * ... * kd)
        second = second.reshape(*second.shape[:3], 1, *rest)
        first = first.reshape(*first.shape, *[1] * len(rest))
        # With one kernel axis the second layer is an ordinary pointwise convolution, also after a transposed one.
        return from_grouped(layer, first), from_grouped(layer, second) if rest else second.flatten(0, 1)
