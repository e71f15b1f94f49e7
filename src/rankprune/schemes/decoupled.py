"""Network decoupling (ND): a pointwise convolution onto r channels per output, then a kernel of its own for each output."""

from torch import Tensor, nn

from rankprune.schemes.base import Convolution, ConvolutionScheme, conv_like, from_grouped, kernel_axes, patches, to_grouped


class Decoupled(ConvolutionScheme):
    """n matrices (c/g, k1 * ... * kd), one per output channel; the sum over r is done by the second, grouped layer."""

    name = "decoupled"
    input_on_rows = True

    def unsupported(self, layer: nn.Module) -> str | None:
        pointwise = isinstance(layer, Convolution) and set(layer.kernel_size) == {1}
        return super().unsupported(layer) or ("a pointwise kernel has nothing to decouple" if pointwise else None)

    def input_patches(self, layer: Convolution, x: Tensor) -> Tensor | None:
        return patches(layer, x, kernel_axes(layer)[:0])

    def to_matrices(self, layer: Convolution, weight: Tensor) -> Tensor:
        return to_grouped(layer, weight).flatten(3).flatten(0, 1)

    def to_weight(self, layer: Convolution, matrices: Tensor) -> Tensor:
        grouped = matrices.unflatten(2, tuple(layer.kernel_size)).unflatten(0, (layer.groups, -1))
        return from_grouped(layer, grouped)

    def empty_pair(self, layer: Convolution, rank: int) -> nn.Sequential:
        n, axes = layer.out_channels, kernel_axes(layer)
        return nn.Sequential(
            conv_like(layer, layer.in_channels, n * rank, groups=layer.groups, axes=axes[:0]),
            conv_like(layer, n * rank, n, groups=n, axes=axes, bias=layer.bias is not None),
        )

    def pair_weights(self, layer: Convolution, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        first = left.transpose(1, 2).flatten(0, 1)  # (n * r, c/g): the r rows of an output channel stand together
        first = first.reshape(*first.shape, *[1] * len(layer.kernel_size))
        second = right.unflatten(2, (1, *layer.kernel_size)).transpose(1, 2)  # in n groups: (n, 1, r, k1, ..., kd)
        return first, from_grouped(layer, second)
