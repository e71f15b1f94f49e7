"""Linear layers: the weight is the matrix."""

from typing import Any

from torch import Tensor, nn

from rankprune.schemes.base import Scheme


class Linear(Scheme[nn.Linear]):
    """One matrix (n, c); the pair is Linear(c, r) without bias, then Linear(r, n)."""

    name = "linear"
    input_on_rows = False

    def unsupported(self, layer: nn.Module) -> str | None:
        return None if type(layer) is nn.Linear else f"{type(layer).__name__} is not a linear layer"

    def input_patches(self, layer: nn.Linear, x: Tensor) -> Tensor | None:
        return x.detach().reshape(1, -1, layer.in_features)

    def to_matrices(self, layer: nn.Linear, weight: Tensor) -> Tensor:
        return weight[None]

    def to_weight(self, layer: nn.Linear, matrices: Tensor) -> Tensor:
        return matrices[0]

    def empty_pair(self, layer: nn.Linear, rank: int) -> nn.Sequential:
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        return nn.Sequential(
            nn.utils.skip_init(nn.Linear, layer.in_features, rank, bias=False, **like),
            nn.utils.skip_init(nn.Linear, rank, layer.out_features, bias=layer.bias is not None, **like),
        )

    def pair_weights(self, layer: nn.Linear, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return right[0], left[0]
