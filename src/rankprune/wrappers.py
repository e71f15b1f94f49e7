"""What stands around a user's model or a part of it, and how both look without it."""

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from rankprune.errors import RankPruneError

_CHECKPOINTED = "_checkpoint_wrapped_module"
_SHARDED = "FSDPModule", "ReplicateModule"


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module in wrappers of torch.compile, DataParallel, Fabric and averages of weights; names refer to it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        wraps = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel)
        if inner is None and (wraps or type(model).__name__ == "_FabricModule"):
            inner = model.module
            sharded: Any = getattr(model, "_forward_module", inner)  # by Fabric; its inner module alone does not show that
            if is_flat(sharded):
                return sharded
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by the names that state_dicts know them by; the wrapper of a checkpointed module is left out."""
    return {saved_name(name): module for name, module in model.named_modules()}


def saved_name(name: str) -> str:
    """The name of a module, parameter or buffer in state_dicts: without what torch's checkpoint_wrapper puts into it."""
    return ".".join(part for part in name.split(".") if part != _CHECKPOINTED)


def own_type(module: nn.Module) -> type[nn.Module]:
    """The type that a module was made with: fully_shard gives it one that it derives from that."""
    kind = type(module)
    added = kind.__bases__[0]
    derived = kind.__module__.startswith("torch.distributed.") and added.__name__ in _SHARDED
    return kind.__bases__[-1] if derived else kind


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after its forward or backward, but for what fully_shard gathers weights by."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(not _gathers(hook) for kind in hooks for hook in kind.values())


def _gathers(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def is_flat(model: nn.Module) -> bool:
    """Whether FSDP of the first kind wraps the model or a part of it, and keeps its weights as flat pieces."""
    return any(kind.__name__ == "FullyShardedDataParallel" for m in model.modules() for kind in type(m).__mro__)


def refuse_flat(model: nn.Module) -> None:
    """Make sure that a model is not, and has not, what FSDP of the first kind wraps.

    Raises:
        RankPruneError: if it has.
    """
    if is_flat(model):
        raise RankPruneError(
            "this model is wrapped in FullyShardedDataParallel, which keeps its weights as flat pieces: shard it with "
            "torch.distributed.fsdp.fully_shard (FSDP2; ModelParallelStrategy in Lightning), or plan before wrapping"
        )
