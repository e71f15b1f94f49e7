"""The whole state of a training in a file, to go on from as if nothing had happened."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankprune.errors import CheckpointError
from rankprune.files import draft_of
from rankprune.recipes.progress import EpochLog, Journal
from rankprune.recipes.settings import differing, in_force
from rankprune.trp import TRP


def write_snapshot(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trp: TRP | None,
    settings: dict[str, Any],
    journal: Journal,
) -> None:
    """Write the state to `path`; `settings` is all that has to be the same for a run to go on as it began."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "trp": None if trp is None else trp.state_dict(),
        "settings": json.dumps(settings, sort_keys=True),
        **asdict(journal),
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(path) as draft:
        torch.save(state, draft)


def read_snapshot(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, trp: TRP | None, settings: dict[str, Any]
) -> Journal:
    """Bring everything into the state in `path`, and return how far it had come.

    Raises:
        CheckpointError: if the file is damaged, none of these, or of a run with other settings.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler fail in any way
        raise CheckpointError(f"the checkpoint {str(path)!r} is damaged; delete it to begin again") from error
    if not isinstance(state, dict) or "settings" not in state:
        raise CheckpointError(f"{str(path)!r} is not a checkpoint of this loop; delete it, or choose another folder")
    there, here = in_force(json.loads(state["settings"])), in_force(json.loads(json.dumps(settings)))
    if there != here:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is of a run with another config: {'; '.join(differing(there, here))}. "
            "Delete it, or choose another folder"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if trp is not None:
        trp.load_state_dict(state["trp"])
    torch.set_rng_state(state["rng"])
    torch.cuda.set_rng_state_all(state["rng_cuda"][: torch.cuda.device_count()])  # there may be fewer now
    log = [EpochLog(**entry) for entry in state["log"]]
    return Journal(log, **{name: state[name] for name in ("step", "loss_sum", "seconds", "waited") if name in state})
