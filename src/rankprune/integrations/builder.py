"""What builds a dense model: a function or class by its name, and arguments that JSON can hold. No name is imported here."""

import inspect
import json
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

from torch import nn

from rankprune.errors import RankPruneError

Builder = Callable[..., nn.Module]
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_IMPLEMENTATION = re.compile(r"_implementation(_internal)?$|^use_kernels$")


def build(builder: Builder, arguments: dict[str, Any]) -> nn.Module:
    """Call a builder. The `config` of a class of transformers is made from its dict, without what names code on the hub.

    Raises:
        RankPruneError: if it raises, or returns no model.
    """
    name = getattr(builder, "__qualname__", repr(builder))
    config_class = getattr(builder, "config_class", None)
    try:
        if config_class is not None and isinstance(arguments.get("config"), dict):
            arguments = {**arguments, "config": config_class.from_dict(_values(arguments["config"]))}
        model = builder(**arguments)
    except Exception as error:
        raise RankPruneError(
            f"{name} raised {type(error).__name__}: {error}; it was called with the arguments that were saved, "
            f"{reprlib.repr(arguments)}. If the dense model is built in another way now, pass the model itself"
        ) from error
    if not isinstance(model, nn.Module):
        raise RankPruneError(f"{name} gives a {type(model).__name__}, not a torch.nn.Module; pass what builds the dense model")
    return model


def _values(config: Any) -> Any:
    """A configuration from JSON, without its choices of implementations, which may be repositories to run code from."""
    if isinstance(config, dict):
        if config.keys() == {"__float__"} and config["__float__"] in ("Infinity", "-Infinity", "NaN"):  # JSON has none of them
            return float(config["__float__"])
        return {key: _values(value) for key, value in config.items() if not _IMPLEMENTATION.search(str(key))}
    return [_values(value) for value in config] if isinstance(config, list) else config


def generation_of(model: Any) -> dict[str, Any] | None:
    """How a language model of transformers generates, which its config does not tell; None for other models."""
    generation: Any = getattr(model, "generation_config", None)
    return json.loads(generation.to_json_string()) if hasattr(generation, "to_json_string") else None


def generate_as(model: Any, generation: dict[str, Any] | None) -> None:
    """Let a model generate as another one did, by its generation_of."""
    own: Any = getattr(model, "generation_config", None)
    if generation is not None and hasattr(own, "from_dict"):
        model.generation_config = type(own).from_dict(_values(generation))


def check_arguments(builder: Builder, arguments: dict[str, Any]) -> None:
    """Make sure that a builder takes these arguments and needs no others, as far as its signature tells.

    Raises:
        RankPruneError: if not.
    """
    if (error := _refusal(builder, arguments)) is not None:
        name = getattr(builder, "__qualname__", repr(builder))
        raise RankPruneError(
            f"{name} cannot be called with arguments={reprlib.repr(arguments)} ({error}); give those that the dense model was "
            "built with"
        ) from error


def _refusal(builder: Builder, arguments: dict[str, Any]) -> TypeError | None:
    try:
        signature = inspect.signature(builder)
    except (TypeError, ValueError):  # some have none
        return None
    try:
        signature.bind(**arguments)
    except TypeError as error:
        return error
    return None


def own_builder(model: Any) -> tuple[str | None, dict[str, Any] | None]:
    """The name of a model's class, and the arguments that it was built from if it keeps them, else None for both.

    Models of transformers and of classes with the hub's mixin keep them. The name alone is None if nobody could import it.
    """
    kind = type(model)
    if hasattr(kind, "config_class") and hasattr(model.config, "to_json_string"):
        if _refusal(kind, {"config": None}):
            return None, None
        arguments = {"config": json.loads(model.config.to_json_string())}
    elif hasattr(kind, "_hub_mixin_init_parameters"):
        arguments = model._hub_mixin_config or {}
        parameters = _names(kind._hub_mixin_init_parameters)
        if not isinstance(arguments, dict) or arguments.keys() != parameters or kind._hub_mixin_coders:
            return None, None  # JSON does not hold all as they were
        hints = _hints(kind)
        if any(isinstance(value, dict) and not _takes_mapping(hints.get(name)) for name, value in arguments.items()):
            return None, None  # it may have been a dataclass
    else:
        return None, None
    return _importable_name(kind), arguments


def _names(parameters: Mapping[str, inspect.Parameter]) -> set[str]:
    """Of a constructor's arguments but `self`, as far as each is one."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name for name, parameter in list(parameters.items())[1:] if parameter.kind not in several}


def _hints(kind: type) -> dict[str, Any]:
    """The types of a constructor's arguments, as far as it says them."""
    try:
        return get_type_hints(kind.__init__)
    except Exception:  # names that are not there when it runs
        return {}


def _takes_mapping(hint: Any) -> bool:
    """Whether a type is a dict or Mapping, or may be one."""
    kinds = [get_origin(each) or each for each in (hint, *get_args(hint))]
    return any(isinstance(each, type) and issubclass(each, Mapping) for each in kinds)


def name_of(builder: Builder | str) -> str:
    """``package.module:callable`` for a builder, or for such a name itself.

    Raises:
        RankPruneError: if nobody could import it by a name.
    """
    name = builder if isinstance(builder, str) else _importable_name(builder)
    if name is None or not _NAME.fullmatch(name):
        raise RankPruneError(
            f"builder={builder!r}: nobody could import it; give a function or class of a module, or its name as "
            "package.module:callable"
        )
    return name


def _importable_name(target: Any) -> str | None:
    """With the outermost package that has the target under its name; None for lambdas, what is in __main__, and the like.

    Nor has code that transformers got from the hub such a name: it is in a module that is called after a commit.
    """
    owner = getattr(target, "__self__", None)
    if owner is not None and not isinstance(owner, type | ModuleType):  # a method of an object
        return None
    if isinstance(owner, type):  # a method of a class, perhaps inherited
        return (name := _importable_name(owner)) and f"{name}.{target.__name__}"
    module, qualname = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if module is None or qualname is None or module.split(".")[0] in ("__main__", "transformers_modules") or "<" in qualname:
        return None
    parts = module.split(".")
    packages = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return f"{next((p for p in packages if getattr(sys.modules.get(p), qualname, None) is target), module)}:{qualname}"
