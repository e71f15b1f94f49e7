"""What optimizers and gradient scalers do around a step: skipped steps, scaled gradients, closures. For optimizer hooks."""

import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankprune.distributed import is_sharded
from rankprune.errors import RankPruneError

F = TypeVar("F", bound=Callable[..., Any])


def eager(function: F) -> F:
    """The function, which torch.compile does not look into: a step may be compiled, with the hooks that it runs."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


def refuse_without_hooks(optimizer: object) -> None:
    """Make sure that it is an optimizer whose step runs hooks.

    Raises:
        RankPruneError: if it is not.
    """
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise RankPruneError(f"attach() takes a torch.optim.Optimizer, not a {kind}; a wrapper holds one, often as .optimizer")
    if not _runs_hooks(optimizer):
        raise RankPruneError(
            f"the step() of this {kind} runs no hooks; attach to the optimizer that it wraps, often held as .optimizer"
        )


def refuse_without(weights: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Make sure that the optimizer holds the weights of these layers.

    Raises:
        RankPruneError: if it does not.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing := [name for name, weight in weights.items() if id(weight) not in held]:
        raise RankPruneError(
            f"the optimizer does not hold the weights of {len(missing)} of {len(weights)} layers ({', '.join(missing[:3])}); "
            "give it model.parameters() of the same model, or leave frozen layers out with exclude="
        )


def _runs_hooks(optimizer: Optimizer) -> bool:
    """Whether its step runs hooks: torch makes it so where Optimizer's constructor ran, which some wrappers leave out.

    Lightning Fabric's wrapper shares its hooks with the optimizer that it steps.
    """
    if getattr(type(optimizer).step, "hooked", False):
        return True
    inner = getattr(optimizer, "optimizer", None)
    hooks, theirs = (getattr(each, "_optimizer_step_pre_hooks", None) for each in (optimizer, inner))
    return hooks is not None and isinstance(inner, Optimizer) and theirs is hooks


def refuse_capture() -> None:
    """Make sure that this step is not being captured in a CUDA graph, which replays it without any hook.

    Raises:
        RankPruneError: if it is.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RankPruneError(
            "a step that is captured in a CUDA graph is replayed without TRP: capture forward and backward, and step outside"
        )


def overflowed(optimizer: Optimizer) -> bool:
    """Whether a GradScaler told a fused optimizer to skip this step."""
    found: Callable[[], float] | Tensor | None = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())


def is_rehearsal(optimizer: Optimizer) -> bool:
    """Whether all learning rates and gradients are zero: so torch.distributed.checkpoint has an optimizer make its state."""
    if not all(_is_zero(group.get("lr", 1.0)) for group in optimizer.param_groups):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return all(gradient.layout == torch.strided and _is_nothing(gradient) for gradient in gradients)


def _is_zero(lr: float | Tensor) -> bool:
    return lr == 0 if not isinstance(lr, Tensor) else lr.device.type == "cpu" and not lr


def _is_nothing(gradient: Tensor) -> bool:
    """Whether it is zero everywhere, on all processes that have shards of it: some may have none."""
    if is_sharded(gradient):
        return not gradient.abs().sum().full_tensor()  # type: ignore[attr-defined]
    return not gradient.count_nonzero()


class Outermost:
    """Tells a step from those within it: an optimizer whose step() calls its base class's runs its hooks for each."""

    def __init__(self) -> None:
        self._running: list[FrameType] = []

    def enter(self) -> bool:
        """Called in a hook before a step: whether no other step is running."""
        frame = _of_the_step(sys._getframe(2))
        if self._running:  # else a step has failed, and no hook was called after it
            above = set(map(id, _above(frame)))
            self._running = [step for step in self._running if id(step) in above]
        self._running.append(frame)
        return len(self._running) == 1

    def leave(self) -> bool:
        """Called in a hook after a step: whether no other step is running."""
        if self._running:
            self._running.pop()
        return not self._running


def _of_the_step(caller: FrameType) -> FrameType:
    """The frame of the step that called a hook, by way of `eager`."""
    while caller.f_globals.get("__name__", "").startswith("torch._dynamo") and caller.f_back is not None:
        caller = caller.f_back
    return caller


def _above(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


@torch.no_grad()
def add_to_gradients(optimizer: Optimizer, terms: Mapping[nn.Parameter, Tensor], strength: float) -> None:
    """Add `strength` times the term to the gradient of every parameter that has one, towards smaller terms."""
    # A GradScaler leaves the gradients of fused optimizers scaled, and tells the scale here.
    scale: Callable[[], float] | Tensor | None = getattr(optimizer, "grad_scale", None)
    if isinstance(scale, Tensor):
        strength *= float(scale)
    ascending = {id(p) for group in optimizer.param_groups if group.get("maximize") for p in group["params"]}
    for weight, value in terms.items():
        if weight.grad is not None:
            term = value.to(weight.grad.dtype).to(weight.grad.device)  # the model may have moved since
            alpha = -strength if id(weight) in ascending else strength
            weight.grad.add_(term, alpha=alpha)  # at once: in float16 a term times the scale alone may be too large


def has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether step() was called with a closure. Its gradients come into being inside the step, after pre-hooks."""
    return callable(kwargs.get("closure", args[1] if len(args) > 1 else None))


def after_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], act: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of step() with a closure that also acts, whenever it has made gradients."""
    closure = kwargs["closure"] if "closure" in kwargs else args[1]

    def closure_and_act(*given: Any, **named: Any) -> Any:  # some optimizers tell theirs whether gradients are wanted
        loss = closure(*given, **named)
        act()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure_and_act}
    return (args[0], closure_and_act, *args[2:]), kwargs
