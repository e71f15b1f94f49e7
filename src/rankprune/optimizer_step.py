"""What optimizers and gradient scalers do around a step: skipped steps, scaled gradients, closures. For optimizer hooks."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def overflowed(optimizer: Optimizer) -> bool:
    """Whether a GradScaler told a fused optimizer to skip this step."""
    found: Callable[[], float] | Tensor | None = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())


@torch.no_grad()
def add_to_gradients(optimizer: Optimizer, terms: Mapping[nn.Parameter, Tensor], strength: float) -> None:
    """Add `strength` times the term to the gradient of every parameter that has one, towards smaller terms."""
    # A GradScaler leaves the gradients of fused optimizers scaled, and tells the scale here.
    scale = getattr(optimizer, "grad_scale", None)
    ascending = {id(p) for group in optimizer.param_groups if group.get("maximize") for p in group["params"]}
    for weight, value in terms.items():
        if weight.grad is not None:
            term = value.to(weight.grad.dtype)
            alpha = -strength if id(weight) in ascending else strength
            weight.grad.add_(term if scale is None else term * scale.to(term.device), alpha=alpha)


def has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether step() was called with a closure. Its gradients come into being inside the step, after pre-hooks."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None) is not None


def after_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], act: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of step() with a closure that also acts, whenever it has made gradients."""
    closure = kwargs["closure"] if "closure" in kwargs else args[1]

    def closure_and_act() -> Any:
        loss = closure()
        act()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure_and_act}
    return (args[0], closure_and_act, *args[2:]), kwargs
