"""A copy of a model with pairs of layers in the places of some of its layers."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from rankprune.errors import RankPruneError
from rankprune.passes import put_in_modes
from rankprune.wrappers import named_modules, saved_name


def with_pairs(model: nn.Module, modules: Mapping[str, nn.Module], pairs: Mapping[str, nn.Module]) -> nn.Module:
    """A deep copy of the model with each planned layer's pair wherever the layer was referred to, also twice.

    What torch.compile has put in the place of a module's own methods, as in ``m.forward = torch.compile(m.forward)``, is left
    out, for it runs the original.

    Raises:
        RankPruneError: if the model cannot be copied as usual, or would run original layers afterwards.
    """
    memo: dict[int, Any] = {id(modules[name]): pair for name, pair in pairs.items()}
    for module in model.modules():  # weight_norm and the like keep a computed tensor, which deepcopy refuses
        for value in _non_leaves(list(module.__dict__.values())):
            memo[id(value)] = value.detach().clone()
    try:
        small = copy.deepcopy(model, memo)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # FSDP2 raises an AssertionError, say
        raise RankPruneError(f"this {type(model).__name__} cannot be copied by copy.deepcopy ({error})") from error
    copied = named_modules(small)
    missing = [name for name, pair in pairs.items() if copied.get(name) is not pair]
    if missing:
        raise RankPruneError(f"the __deepcopy__ of this {type(model).__name__} does not copy its layers {missing[:3]} as usual")
    copies, placed = dict(small.named_modules()), set(pairs.values())  # wrappers have names of their own here
    for name, module in model.named_modules():
        if name not in copies or copies[name] in placed:
            continue
        for attribute in _compiled_methods(module):
            copies[name].__dict__.pop(attribute, None)
        shared = isinstance(copies[name].__dict__.get("forward"), FunctionType) and not hasattr(module, "_orig_mod")
        inside = saved_name(name)
        if shared and any(pair.startswith(f"{inside}." if inside else "") for pair in pairs):
            raise RankPruneError(
                f"the forward of {name or 'the model'!r} has been replaced on the instance by a function, which in a copy "
                "would still run the original's layers; make it a types.MethodType, or decompose a fresh model, like "
                "TRP.finalize(into=...)"
            )
    flags = {name: module.training for name, module in model.named_modules()}
    modes = {copy: flags[name] for name, copy in copies.items() if name in flags}
    modes |= {half: modules[name].training for name, pair in pairs.items() for half in pair.modules()}
    if any(module.training != training for module, training in modes.items()):  # some build themselves anew, in training mode
        put_in_modes(modes)
    for module in small.modules():  # keep these off their fast paths, which read linear1.weight
        if isinstance(module, nn.TransformerEncoder) and any(map(_has_pairs, module.layers)):
            module.use_nested_tensor = False
        elif _has_pairs(module):
            module.activation_relu_or_gelu = 0
    return small


def _has_pairs(module: nn.Module) -> TypeGuard[nn.TransformerEncoderLayer]:
    """Whether it is a TransformerEncoderLayer with something else in the place of a linear layer."""
    return isinstance(module, nn.TransformerEncoderLayer) and {type(module.linear1), type(module.linear2)} != {nn.Linear}


def _compiled_methods(module: nn.Module) -> list[str]:
    """The attributes of the instance that are its own methods, compiled."""
    compiled = {name: value for name, value in vars(module).items() if hasattr(value, "_torchdynamo_orig_callable")}
    methods = {name: inspect.unwrap(value, stop=lambda inner: hasattr(inner, "__self__")) for name, value in compiled.items()}
    return [name for name, method in methods.items() if getattr(method, "__self__", None) is module]


def _non_leaves(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, or in the lists, tuples and dicts that it is of, which are part of a graph."""
    if isinstance(value, Tensor) and not value.is_leaf:
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _non_leaves(part)
