"""What a model is called with."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rankprune.errors import RankPruneError

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""What a model is called with: one tensor, positional arguments, or keyword arguments."""

# isinstance with tuples of types here, for exports run through it, and torch 2.6 cannot trace unions.


def call(model: Callable[..., Any], x: Inputs) -> Any:
    """Run the model on `x`: a tensor, a tuple of positional arguments, or a dict of keyword arguments."""
    if isinstance(x, Mapping):
        return model(**x)
    if isinstance(x, (tuple, list)):
        return model(*x)
    return model(x)


def tried(
    model: Callable[..., Any],
    x: Inputs,
    called: str = "these example inputs",
    advice: str = "give a tensor, a tuple of arguments or a dict of named ones",
) -> Any:
    """call() with inputs that the user gave and that may not fit the model.

    Args:
        called: what they are, for the message.
        advice: what to give in their place.

    Raises:
        RankPruneError: telling what they were and what the model raised.
    """
    try:
        return call(model, x)
    except (RankPruneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        positional, named = arguments(x)
        given = [_in_words(a) for a in positional] + [f"{name}={_in_words(a)}" for name, a in named.items()]
        raise RankPruneError(
            f"the model does not run on {called}, which call it with ({', '.join(given)}): {type(error).__name__}: {error}; "
            f"{advice}"
        ) from error


def _in_words(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"{str(argument.dtype).removeprefix('torch.')} tensor {tuple(argument.shape)} on {argument.device}"
    return repr(argument) if isinstance(argument, int | float | str) else type(argument).__name__


def arguments(x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with, as positional and keyword arguments."""
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x) if isinstance(x, (tuple, list)) else (x,)), {}


def leaves(values: Any) -> Iterator[Any]:
    """All in a model's inputs or output that holds nothing itself, in order."""
    return (leaf for _, leaf in placed_leaves(values))


def placed_leaves(values: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """leaves(), each after the names and positions that lead to it."""
    if isinstance(values, Mapping):
        parts = list(values.items())
    elif is_dataclass(values) and not isinstance(values, type):
        parts = [(field.name, getattr(values, field.name)) for field in fields(values)]
    elif isinstance(values, (tuple, list)):
        parts = list(enumerate(values))
    else:
        yield place, values
        return
    for name, part in parts:
        yield from placed_leaves(part, (*place, name))


def tensors(values: Any) -> list[Tensor]:
    """All tensors in a model's inputs or output, in order."""
    return [leaf for leaf in leaves(values) if isinstance(leaf, Tensor)]


def shapes(x: Inputs) -> tuple[tuple[int, ...], ...]:
    """Those of all tensors in a model's inputs, in order."""
    return tuple(tuple(tensor.shape) for tensor in tensors(x))


def each_leaf(function: Callable[[Any], Any], values: Any) -> Any:
    """Inputs, in which the function has replaced every leaf, in order. Containers keep their types."""
    if isinstance(values, Mapping):
        parts = {key: each_leaf(function, value) for key, value in values.items()}
        if isinstance(values, MutableMapping) and type(values) is not dict:
            copied = copy.deepcopy(values, {id(leaf): leaf for leaf in leaves(values)})
            for key, value in parts.items():  # those of transformers have no update()
                copied[key] = value
            return copied
        return parts
    if type(values) in (tuple, list):
        return type(values)(each_leaf(function, value) for value in values)
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(each_leaf(function, value) for value in values))
    if is_dataclass(values) and not isinstance(values, type):
        return replace(values, **{f.name: each_leaf(function, getattr(values, f.name)) for f in fields(values) if f.init})
    return function(values)


def on_device(x: Any, device: torch.device | str) -> Any:
    """Inputs with every tensor in them, however deep, on `device`."""
    return each_leaf(lambda a: a.to(device) if isinstance(a, Tensor) else a, x)


def cloned(x: Any) -> Any:
    """Inputs of which a model may change its own tensors: some normalise a batch in place."""
    return each_leaf(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, x)


def with_one_more(x: Any) -> Any:
    """Inputs of a batch that is larger by one."""
    return each_leaf(lambda a: larger_by_one(a) if isinstance(a, Tensor) and a.dim() else a, x)


def first_alone(x: Any) -> Any:
    """Inputs of the first example of a batch."""
    return each_leaf(lambda a: a[:1] if isinstance(a, Tensor) and a.dim() else a, x)


def larger_by_one(batch: Tensor) -> Tensor:
    """A batch in which the first example comes again in the end; its axes lie in memory as they did."""
    order = sorted(range(batch.dim()), key=batch.stride, reverse=True)
    longer = torch.cat([batch, batch[:1]])
    return longer.permute(order).contiguous().permute([order.index(axis) for axis in range(batch.dim())])


def check_batches(calibration: object) -> None:
    """Make sure that these are several inputs and not one, whose parts would be taken for inputs.

    Raises:
        RankPruneError: for a tensor or a dict.
    """
    if isinstance(calibration, Tensor | Mapping):
        kind = "tensor" if isinstance(calibration, Tensor) else type(calibration).__name__
        raise RankPruneError(f"calibration is one {kind}: give a list of batches, each as the model is called with")
