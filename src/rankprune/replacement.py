"""A copy of a model with pairs of layers in the places of some of its layers."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from rankprune.errors import RankPruneError


def with_pairs(model: nn.Module, modules: Mapping[str, nn.Module], pairs: Mapping[str, nn.Module]) -> nn.Module:
    """A deep copy of the model with each planned layer's pair wherever the layer was referred to, also twice."""
    memo: dict[int, Any] = {id(modules[name]): pair for name, pair in pairs.items()}
    for module in model.modules():  # weight_norm and the like keep a computed tensor, which deepcopy refuses
        for value in _non_leaves(list(module.__dict__.values())):
            memo[id(value)] = value.detach().clone()
    try:
        small = copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise RankPruneError(f"this {type(model).__name__} cannot be copied by copy.deepcopy ({error})") from error
    copied = dict(small.named_modules())
    missing = [name for name, pair in pairs.items() if copied.get(name) is not pair]
    if missing:
        raise RankPruneError(f"the __deepcopy__ of this {type(model).__name__} does not copy its layers {missing[:3]} as usual")
    for module in small.modules():  # keep these off their fast paths, which read linear1.weight
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer) and {type(module.linear1), type(module.linear2)} != {nn.Linear}:
            module.activation_relu_or_gelu = 0
    return small


def _non_leaves(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, or in the lists, tuples and dicts that it is of, which are part of a graph."""
    if isinstance(value, Tensor) and not value.is_leaf:
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _non_leaves(part)
