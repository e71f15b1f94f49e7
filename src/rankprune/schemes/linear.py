"""Linear layers: the weight is the matrix."""

from typing import Any

from torch import Tensor, nn

from rankprune.schemes.base import Scheme
from rankprune.wrappers import own_type


def is_linear(layer: nn.Module) -> bool:
    """Whether it is nn.Linear itself, or the linear layer that GPT-2 of transformers calls Conv1D."""
    return own_type(layer) is nn.Linear or _is_conv1d(layer)


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether the weight is (c, n) instead of (n, c); told by name, for transformers need not be installed."""
    kind = own_type(layer)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


class Linear(Scheme[nn.Module]):
    """One matrix (n, c); the pair is Linear(c, r) without bias, then Linear(r, n)."""

    name = "linear"
    input_on_rows = False

    def unsupported(self, layer: nn.Module) -> str | None:
        return None if is_linear(layer) else f"{type(layer).__name__} is not a linear layer"

    def input_patches(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        return x.detach().reshape(1, -1, x.shape[-1])

    def to_matrices(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.mT[None] if _is_conv1d(layer) else weight[None]

    def to_weight(self, layer: nn.Module, matrices: Tensor) -> Tensor:
        return matrices[0].mT if _is_conv1d(layer) else matrices[0]

    def empty_pair(self, layer: nn.Module, rank: int) -> nn.Sequential:
        weight = layer.get_parameter("weight")
        n, c = self.to_matrices(layer, weight).shape[1:]
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        return nn.Sequential(
            nn.utils.skip_init(nn.Linear, c, rank, bias=False, **like),
            nn.utils.skip_init(nn.Linear, rank, n, bias=layer.bias is not None, **like),
        )

    def pair_weights(self, layer: nn.Module, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return right[0], left[0]
