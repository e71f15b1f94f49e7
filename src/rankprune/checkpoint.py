"""Artefacts: decomposed models in folders of safetensors and JSON. Nothing here executes a pickle."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankprune.cost import parameter_count
from rankprune.decompose import skeleton
from rankprune.errors import CheckpointError, RankPruneError
from rankprune.files import draft_of
from rankprune.plan import Plan
from rankprune.schemes.base import Convolution
from rankprune.state_dicts import load_exactly, read_safetensors, save_tensors
from rankprune.wrappers import named_modules, saved_name, unwrap

FORMAT = 1
"""Version of an artefact. A reader refuses any other."""
FILES = _WEIGHTS, _HEAD = "model.safetensors", "rankprune.json"


def save(folder: str | Path, model: nn.Module, plan: Plan) -> None:
    """Write a decomposed model to `folder`: its tensors in model.safetensors, the plan and format version in rankprune.json.

    Tensors that the model shares are written once and are shared again after load.

    Raises:
        CheckpointError: if the model does not have the pairs that the plan speaks of.
    """
    model = unwrap(model)
    modules = named_modules(model)
    for name, entry in plan.decomposed.items():
        pair = modules.get(name)
        if not isinstance(pair, nn.Sequential) or len(pair) != 2 or parameter_count(pair) != entry.params_after:
            raise CheckpointError(
                f"layer {name!r} is a {type(pair).__name__}, but the plan decomposes it at rank {entry.rank} into two of "
                f"{entry.params_after} parameters in all: save the model "
                "that decompose(model, plan) returned, with that very plan"
            )
    folder = Path(folder)
    if folder.is_file():
        raise CheckpointError(f"{str(folder)!r} is a file; give a folder to save to")
    folder.mkdir(parents=True, exist_ok=True)
    with draft_of(folder / _HEAD) as description, draft_of(folder / _WEIGHTS) as weights:  # what fails leaves older ones whole
        aliases = save_tensors(weights, model)
        head = {
            "format": FORMAT,
            "architecture": type(model).__name__,
            "geometry": _geometry(model),
            "aliases": aliases,
            "buffers": _unsaved_buffers(model),
            "plan": json.loads(plan.to_json()),
        }
        description.write_text(json.dumps(head, indent=1))


def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """The decomposed model in `folder`, built from a fresh dense `model` of the same architecture, which is untouched.

    Tensors keep the dtype they were saved with, as do buffers that are in no state_dict, and go to the device of `model`; an
    artefact saved on a GPU loads on a CPU.

    Raises:
        CheckpointError: if a file is missing, truncated, foreign or of another format, or the architecture differs; it says
            in what, and what to do.
    """
    folder = Path(folder)
    head = _read_head(folder)
    tensors = read_safetensors(folder / _WEIGHTS)
    try:
        small = skeleton(model, head.plan)
    except RankPruneError as error:
        raise CheckpointError(f"the artefact {str(folder)!r} does not fit this model: {error}") from error
    geometry, here = head.geometry, _geometry(small)
    if differing := [name for name in {**geometry, **here} if geometry.get(name) != here.get(name)]:
        name = differing[0]
        raise CheckpointError(
            f"the artefact {str(folder)!r} is of another architecture: its layer {name!r} has {geometry.get(name)}, that of "
            f"this model {here.get(name)}. Build the model as it was when it was saved"
        )
    tensors |= {alias: tensors[name] for alias, name in head.aliases.items() if name in tensors}
    load_exactly(small, tensors, str(folder))
    for name, buffer in small.named_buffers():
        if dtype := head.buffers.get(saved_name(name)):
            buffer.data = buffer.data.to(dtype)
    return small


def load_plan(folder: str | Path) -> Plan:
    """The plan of an artefact: to save the model again, say, after it was loaded and fine-tuned.

    Raises:
        CheckpointError: as load.
    """
    return _read_head(Path(folder)).plan


@dataclass(frozen=True)
class _Head:
    """What an artefact says beside its tensors; `buffers` are the dtypes of those that no state_dict holds."""

    plan: Plan
    aliases: Mapping[str, str]
    geometry: Mapping[str, Any]
    buffers: Mapping[str, torch.dtype]


def _read_head(folder: Path) -> _Head:
    path = folder / _HEAD
    if not path.is_file():
        raise CheckpointError(f"no artefact in {str(folder)!r}: {_HEAD} is missing; give the folder that save() wrote")
    try:
        head = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: not JSON ({error}); copy or save it again") from error
    if not isinstance(head, dict) or "plan" not in head:
        raise CheckpointError(f"{str(path)!r} was not written by rankprune: it holds no plan")
    if head.get("format") != FORMAT:
        raise CheckpointError(
            f"{str(path)!r} is of format {head.get('format')!r}, this version reads {FORMAT}: save it again with this version"
        )
    aliases = head.get("aliases")
    if not isinstance(aliases, dict) or not all(isinstance(name, str) for name in aliases.values()):
        raise CheckpointError(f"{str(path)!r} is damaged: its aliases are {aliases!r}; copy or save it again")
    named = head.get("buffers")
    known = {name: getattr(torch, str(dtype), None) for name, dtype in named.items()} if isinstance(named, dict) else {}
    buffers = {name: dtype for name, dtype in known.items() if isinstance(dtype, torch.dtype)}
    if not isinstance(named, dict) or buffers.keys() != named.keys():
        raise CheckpointError(f"{str(path)!r} is damaged: its buffers are {named!r}; copy or save it again")
    if not isinstance(geometry := head.get("geometry"), dict):
        raise CheckpointError(f"{str(path)!r} is damaged: its geometry is {geometry!r}; copy or save it again")
    return _Head(Plan.from_json(json.dumps(head["plan"])), aliases, geometry, buffers)


def _geometry(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What tensors do not tell of each convolution: stride, padding and the like, as JSON gives them back."""
    fields = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
    convolutions = {name: m for name, m in named_modules(model).items() if isinstance(m, Convolution)}
    return {name: json.loads(json.dumps({f: getattr(m, f) for f in fields}, default=int)) for name, m in convolutions.items()}


def _unsaved_buffers(model: nn.Module) -> dict[str, str]:
    """The dtypes of floating-point buffers that are in no state_dict, such as tables of positions."""
    saved = model.state_dict().keys()
    named = {saved_name(name): buffer for name, buffer in model.named_buffers()}
    buffers = {name: b for name, b in named.items() if name not in saved and b.is_floating_point()}
    return {name: str(buffer.dtype).removeprefix("torch.") for name, buffer in buffers.items()}
