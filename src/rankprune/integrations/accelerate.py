"""TRP in a loop of Accelerate's."""

from types import MethodType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rankprune.errors import MissingExtraError
from rankprune.trp import TRP

try:
    from accelerate import Accelerator
except ImportError as error:
    raise MissingExtraError("accelerate", "accelerate") from error


def attach(trp: TRP, accelerator: Accelerator, optimizer: Optimizer) -> TRP:
    """Attach `trp` to an optimizer that `accelerator` prepared, and put its state among those it saves and loads.

    Make the TRP from the prepared model, with example_inputs on ``accelerator.device``, and attach it before
    ``accelerator.load_state``. Under a budget of latency resume in another order, for attaching times the network unless the
    state with its times is there: ``accelerator.register_for_checkpointing(trp)``, ``accelerator.load_state(folder)``, and
    then attach. ``accelerator.log(trp.metrics(), step)`` logs ranks, MACs and overhead to every tracker.

    Under mixed precision Accelerate puts autocast around the model's forward, and what ``trp.finalize()`` returns has it, too;
    what the `finalize` beside this returns does not.

    Args:
        trp: attached nowhere yet.
        accelerator: whose save_state and load_state take the state along.
        optimizer: as it came from ``accelerator.prepare``.

    Returns:
        `trp`.

    Raises:
        RankPruneError: whatever TRP.attach raises.
    """
    trp.attach(innermost(optimizer))
    if not any(known is trp for known in accelerator._custom_objects):  # registered twice, it would be saved twice
        accelerator.register_for_checkpointing(trp)
    return trp


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that one is wrapped around: Accelerate's have no hooks of their own."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def finalize(trp: TRP, into: nn.Module | None = None) -> nn.Module:
    """TRP.finalize: a decomposed copy of the model, which runs in the precision of its weights whatever it was trained in.

    Arguments and errors are those of TRP.finalize.
    """
    small = trp.finalize(into)
    take_autocast_off(small)
    return small


def take_autocast_off(model: nn.Module) -> None:
    """Give a model its own forward back, around which Accelerate has put autocast, each time that it was prepared.

    It can be prepared again then; what is marked as prepared is passed over, without autocast, compilation or a device.
    """
    model.__dict__.pop("_is_accelerate_prepared", None)
    if model.__dict__.pop("_original_forward", None) is None:
        return
    forward = model.__dict__.pop("forward")
    while _home(forward).startswith("accelerate."):
        forward = forward.__wrapped__
        if _home(forward).startswith("torch.amp."):
            forward = forward.__wrapped__
    own = getattr(forward, "__func__", forward)
    if own is not type(model).forward:  # the user's, on the instance
        model.forward = MethodType(own, model)


def _home(function: Any) -> str:
    """The module that a function's code is in, whatever it says it wraps."""
    function = getattr(function, "__func__", function)
    return getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
