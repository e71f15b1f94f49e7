"""What a measurement is of, as text: two networks share a latency where these are equal, and only there.

A repr tells layers and their sizes. To it come all that decides on a time and a repr leaves out: MACs, attributes such as the
number of heads, types, the code of every forward, inputs, and in what precision this process computes.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from inspect import unwrap
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.cost import count
from rankprune.inputs import Inputs, placed_leaves, shapes
from rankprune.precision import float32_products
from rankprune.schemes.base import is_channels_last

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_DEEPEST = 8


def described(model: nn.Module, x: Inputs, more: object = None) -> str:
    """A text that differs where the network, its inputs or `more` differs."""
    inputs = [
        (place, (tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else _plain(leaf))
        for place, leaf in placed_leaves(x)
    ]
    types = [(p.dtype, is_channels_last(p)) for p in model.parameters()]
    before = [_plain_attributes(module) for module in model.modules()]
    kind = f"{type(model).__module__}.{type(model).__qualname__} {count(model, x).macs}"  # forwards differ under one repr
    after = [_plain_attributes(module) for module in model.modules()]
    parts = [a for a, b in zip(before, after, strict=True) if a == b]  # a module may count its calls
    code = [_code(function) for kind_of in {type(m): None for m in model.modules()} for function in _own_functions(kind_of)]
    numerics = numerics_on(next((p.device.type for p in model.parameters()), "cpu"))
    digest = hashlib.sha256(f"{kind} {model} {parts} {types} {code} {inputs} {numerics} {more}".encode()).hexdigest()[:16]
    return f"{type(model).__name__} {digest} on {list(shapes(x))}"


def _own_functions(kind: type) -> Iterator[FunctionType]:
    """Those of a type of module and its bases, but for torch's own: a network's forward may compute what no repr shows."""
    for base in kind.__mro__:
        if not base.__module__.startswith("torch."):
            yield from (value for value in vars(base).values() if isinstance(value, FunctionType))


def _code(function: FunctionType, deep: int = 0) -> str:
    """What a function does, as text, without where it stands; a decorated one and what it wraps."""

    def told(code: CodeType) -> list[Any]:
        constants = [told(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts if not isinstance(c, frozenset)]
        return [code.co_code.hex(), code.co_names, constants]

    found = [f for f in dict.fromkeys((function, unwrap(function))) if isinstance(f, FunctionType)]
    return str([(told(f.__code__), _plain(f.__defaults__, deep), _plain(f.__kwdefaults__, deep)) for f in found])


def numerics_on(device: str) -> str:
    """How a network computes beside its own types: in autocast's, with what in place of float32, by which algorithms."""
    narrowed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    autocast = torch.get_autocast_dtype(device) if narrowed else None
    narrowed_by: list[object] = [float32_products()]
    for backend in (torch.backends.mkldnn, torch.backends.cudnn):  # convolutions may be narrowed by themselves
        narrowed_by.append(getattr(getattr(backend, "conv", None), "fp32_precision", None))
    if device == "cuda":
        cudnn = torch.backends.cudnn
        narrowed_by += [cudnn.enabled, cudnn.benchmark, cudnn.deterministic]
        with suppress(RuntimeError):  # of settings of both the older and the newer kind
            narrowed_by.append(cudnn.allow_tf32)
    elif not torch.backends.mkldnn.enabled:
        narrowed_by.append("no mkldnn")
    if torch.are_deterministic_algorithms_enabled():
        narrowed_by.append("deterministic")
    return f"autocast {autocast}, float32 {narrowed_by}"


def _plain_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """Those that a repr may leave out, such as the number of heads, and the name of a forward that wraps the module's own."""
    own = [(name, _plain(value)) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
    forward = vars(module).get("forward")
    wrapper = [] if forward is None else [("forward", getattr(forward, "__qualname__", type(forward).__qualname__))]
    return [(name, value) for name, value in own if value is not None] + wrapper


def _plain(value: Any, deep: int = 0) -> Any:
    """Numbers, texts, types of data, functions, what holds such, and a configuration; None for all else."""
    if deep > _DEEPEST:  # it may hold itself
        return None
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype | Enum):
        return str(value)
    if callable(getattr(type(value), "to_json_string", None)):
        return value.to_json_string(), getattr(value, "_attn_implementation", None)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name, None), deep + 1) for field in fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(part, deep + 1) for part in value]
    if isinstance(value, dict):
        return {str(key): _plain(part, deep + 1) for key, part in value.items()}
    if isinstance(value, partial):
        return ["partial", _plain(value.func, deep + 1), _plain(value.args, deep + 1), _plain(value.keywords, deep + 1)]
    if isinstance(value, MethodType):
        return _plain(value.__func__, deep + 1)
    if isinstance(value, FunctionType):
        return [value.__qualname__, _code(value, deep + 1)]
    if isinstance(value, BuiltinFunctionType):
        return value.__qualname__
    return None
