"""State dicts in files: written as safetensors, read from what users have. Nothing here executes a pickle."""

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rankprune.errors import CheckpointError
from rankprune.wrappers import saved_name, unwrap

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_COUNT = "n_averaged"
"""What torch's AveragedModel keeps beside the model."""
_NESTED = ("state_dict", "model_state_dict", "model", "net", "ema")


def save_tensors(path: str | Path, model: nn.Module, notes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Write the state_dict to a safetensors file, each shared tensor once; returns the names left out and their twins.

    Args:
        notes: texts to keep in the file's header.
    """
    tensors, aliases = _unique(unwrap(model).state_dict())
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, None if notes is None else dict(notes))
    with suppress(OSError):  # some file systems have no modes
        path.chmod(mode)  # safetensors writes files that nobody else may read
    return aliases


def _unique(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors without shared ones, and the names left out, each with the name it shares its tensor with."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"the state of this model holds {name!r}, a {type(value).__name__} and no tensor (quantized layers and "
                "get_extra_state do that); safetensors cannot hold it: save state_dict() with torch.save instead"
            )
        if value.layout != torch.strided:
            raise CheckpointError(
                f"the state of this model holds {name!r}, a tensor of layout {value.layout}; safetensors cannot hold it: "
                "register it as a buffer with persistent=False, or save state_dict() with torch.save instead"
            )
    kept: dict[str, Tensor] = {}
    first: dict[tuple, str] = {}
    aliases: dict[str, str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        whole = tensor.detach().contiguous()
        storage = whole.untyped_storage()
        if storage.nbytes() != whole.nbytes or storage.data_ptr() in storages:  # a part of some memory, or another's
            whole = whole.clone()
        storages.add(storage.data_ptr())
        kept[name] = whole
    return kept, aliases


def read_notes(path: str | Path) -> dict[str, str]:
    """What save_tensors noted in a file; nothing, if that is not there or not of its making."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def read_tensors(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """A model's state_dict from a user's file, on the CPU.

    ``.safetensors`` files, and PyTorch's own (``.pt``, ``.pth``, ``.th``, ``.bin``) read with ``weights_only=True``. A
    state_dict nested under a usual key is found, and prefixes left by DataParallel and torch.compile are taken off,
    unless they are in the names of `model` too.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds no state_dict.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _without_prefixes(read_safetensors(path), model)
    if not path.is_file():
        raise CheckpointError(f"there is no file {str(path)!r}; check the path, or save it first")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{str(path)!r} is damaged, or holds more than tensors ({reason}); save model.state_dict() alone"
        ) from error
    return _without_prefixes(_find_state_dict(content, path), model)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name, on the CPU.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {str(path)!r}; check the path, or save it first")
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise CheckpointError(
            f"{str(path)!r} is truncated or not a safetensors file ({error}); copy or save it again"
        ) from error


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    nested = [content] + ([content[key] for key in _NESTED if key in content] if isinstance(content, Mapping) else [])
    for value in nested:
        if isinstance(value, Mapping) and value and all(isinstance(v, Tensor) for v in value.values()):
            return dict(value)
    keys = list(content)[:6] if isinstance(content, Mapping) else type(content).__name__
    raise CheckpointError(f"{str(path)!r} holds no state_dict of tensors, but {keys}; save model.state_dict()")


def _without_prefixes(tensors: Mapping[str, Tensor], model: nn.Module | None) -> dict[str, Tensor]:
    if model is not None and tensors.keys() <= model.state_dict().keys():
        return dict(tensors)
    if all(key == _COUNT or key.startswith("module.") for key in tensors):
        tensors = {key: value for key, value in tensors.items() if key != _COUNT}
    while tensors and (prefix := next((p for p in _WRAPPER_PREFIXES if all(k.startswith(p) for k in tensors)), None)):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return dict(tensors)


def load_exactly(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into the model, all of them and into all of it, keeping their dtypes.

    Only BatchNorm's num_batches_tracked may be missing, as it is from files written before it existed.

    Raises:
        CheckpointError: listing missing, surplus and differently shaped tensors.
    """
    own = model.state_dict()
    if meta := [name for name, value in own.items() if isinstance(value, Tensor) and value.is_meta]:
        raise CheckpointError(f"{meta[0]} of the model is on the meta device; build the model on a real one")
    if lazy := [name for name, value in own.items() if is_lazy(value)]:
        raise CheckpointError(f"{lazy[0]} of the model has no shape yet; run one forward pass first")
    tensors = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")} | dict(tensors)
    for names in _tied(model):  # files of safetensors hold a shared tensor once
        if given := next((name for name in names if name in tensors), None):
            tensors = {name: tensors[given] for name in names if name in own} | tensors
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is not in the model" for name in tensors if name not in own]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{source!r} does not fit this {type(model).__name__}: {'; '.join(problems[:5])}{more}. Build the model as it was "
            "when it was saved"
        )
    _check_ties(model, tensors, source)
    with torch.no_grad():
        for name, slot in (*model.named_parameters(), *model.named_buffers()):
            given = tensors.get(saved_name(name))
            if given is not None and slot.dtype != given.dtype:
                slot.data = slot.data.to(given.dtype)
            if 0 in slot.stride() and slot.numel() > 1:
                slot.data = slot.data.clone()  # an expanded tensor cannot be written to
    complete = OrderedDict(tensors)
    complete._metadata = own._metadata  # type: ignore[attr-defined]  # some modules ask it for the version of their format
    model.load_state_dict(complete)


def _check_ties(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Make sure that names for one tensor of the model have equal values; of others the last one would win."""
    for names in _tied(model):
        first, *others = [name for name in names if name in tensors] or names[:1]
        for name in others:
            one, other = tensors[first], tensors[name]
            if one is not other and (one.dtype != other.dtype or not torch.equal(one, other)):
                raise CheckpointError(
                    f"{source!r} holds different values for {first!r} and {name!r}, which are one tensor in this "
                    f"{type(model).__name__}. Build the model without tying them"
                )


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of every parameter and buffer that has several."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, slot in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names[id(slot)].append(saved_name(name))
    return [each for each in names.values() if len(each) > 1]
