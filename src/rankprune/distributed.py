"""Processes that train one model together: who factors which layer, and how the results reach everyone.

Alone, a process is a team of one, and the same code runs without any communication.
"""

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankprune.errors import RankPruneError
from rankprune.linalg import in_parts

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
T = TypeVar("T")


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, as FSDP2 and tensor parallelism make of parameters."""
    module = sys.modules.get("torch.distributed.tensor")  # no tensor can be one before that is imported
    return module is not None and isinstance(tensor, module.DTensor)


def reshard(model: nn.Module) -> None:
    """Make the parameters the shards again that an optimizer holds: after a forward, FSDP2 leaves whole ones in the root."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sharded_like(whole: Tensor, target: Tensor) -> Tensor:
    """A tensor that this process has in full, sharded as `target` is; itself if that is not sharded."""
    if not is_sharded(target):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = target.device_mesh  # type: ignore[attr-defined]
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=target.placements)  # type: ignore[attr-defined]


def _of_nccl() -> torch.device:
    """The device that this process communicates from under NCCL."""
    return torch.device("cuda", torch.cuda.current_device())


class Team:
    """The processes of a group; with torch.distributed not initialised, a team of one.

    Weights are replicated on all members (DDP) or sharded over them (FSDP2). All members call the methods in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        together = dist.is_available() and dist.is_initialized()
        self._group = group
        self.size = dist.get_world_size(group) if together else 1
        self.rank = dist.get_rank(group) if together else 0

    @classmethod
    def alone(cls) -> "Team":
        """A team of one, whatever is initialised."""
        team = cls.__new__(cls)
        team._group, team.size, team.rank = None, 1, 0
        return team

    @property
    def parted(self) -> bool:
        """Whether it was of several processes, whose groups have been destroyed since."""
        return self.size > 1 and not dist.is_initialized()

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Make sure that these are the same, and in the same order, for all members.

        Raises:
            RankPruneError: on every member, naming those that are not.
        """
        if self.size == 1:
            return
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, dict(facts), group=self._group)
        if differing := [name for name in facts if any(theirs[name] != answers[0][name] for theirs in answers)]:
            raise RankPruneError(
                f"the {self.size} processes differ in {', '.join(differing)}; give those that train models of their own a "
                "process_group= each"
            )

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Give every layer to one member so that all have about equal work: the costliest first, each to the least laden."""
        load = [0.0] * self.size
        owner = {}
        for name in sorted(costs, key=lambda n: (-costs[n], n)):
            owner[name] = min(range(self.size), key=load.__getitem__)
            load[owner[name]] += costs[name]
        return owner

    def whole(self, weight: Tensor) -> Tensor:
        """A weight in full: itself, or all shards put together."""
        if not is_sharded(weight):
            return weight
        mesh = weight.device_mesh  # type: ignore[attr-defined]
        return weight.to(mesh.device_type).full_tensor().to(weight.device)  # type: ignore[attr-defined]  # may be offloaded

    def fill(self, dense: nn.Module, model: nn.Module) -> None:
        """Load the weights of `model` into `dense`, in parts: all of a sharded model may be more than a GPU holds.

        Raises:
            RankPruneError: if the two are not of one architecture.
        """
        state = model.state_dict()
        sizes = {name: value.numel() if isinstance(value, Tensor) else 0 for name, value in state.items()}
        if differing := state.keys() ^ dense.state_dict().keys():
            raise RankPruneError(f"into= is no model like the trained one: they differ in {sorted(differing)[:3]}")
        for part in in_parts(sizes):
            whole = {name: self.whole(state[name]) for name in part}
            try:
                dense.load_state_dict(whole, strict=False)
            except RuntimeError as error:
                raise RankPruneError(f"into= is no model like the trained one: {error}") from error

    def share(self, compute: Callable[[], Mapping[K, V]]) -> dict[K, V]:
        """What all members computed, together. An error of one becomes an error of all, so that none waits for ever.

        Raises:
            RankPruneError: on every member, if one of them raised anything; the member's own error is raised there.
        """
        if self.size == 1:
            return dict(compute())
        mine: Mapping[K, V] = {}
        error: Exception | None = None
        try:
            mine = compute()
        except Exception as e:
            error = e
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, (mine, None if error is None else str(error)), group=self._group)
        if error is not None:
            raise error
        for rank, (_, message) in enumerate(answers):
            if message is not None:
                raise RankPruneError(f"process {rank} of {self.size}: {message}")
        return {key: value for part, _ in answers for key, value in part.items()}

    def together(self, compute: Callable[[], T]) -> T:
        """What this member computed, once all have. Errors are shared as in share, and nothing else is."""
        mine: list[T] = []

        def run() -> Mapping[str, None]:
            mine.append(compute())
            return {}

        self.share(run)
        return mine[0]

    @torch.no_grad()
    def publish(self, targets: Mapping[str, Tensor], values: Mapping[str, Tensor], owner: Mapping[str, int]) -> None:
        """Write the owners' values into everyone's targets, in place, shards into shards.

        Args:
            values: the whole tensors, of those targets that this member owns.
        """
        if self.size == 1:
            for name, target in targets.items():
                target.copy_(sharded_like(values[name].to(target.dtype), target))
            return
        parcels: dict[tuple[int, torch.dtype, torch.device], list[str]] = defaultdict(list)
        for name, target in targets.items():
            if is_sharded(target):
                self._scatter(target, values.get(name), owner[name])
            else:
                parcels[owner[name], target.dtype, target.device].append(name)
        for (source, dtype, device), names in parcels.items():
            sizes = [targets[name].numel() for name in names]
            if source == self.rank:
                flat = torch.cat([values[name].to(dtype).reshape(-1) for name in names])
            else:
                flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            self._broadcast(flat, source)
            for name, part in zip(names, flat.split(sizes), strict=True):
                targets[name].copy_(part.view(targets[name].shape))

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        if tensor.device.type == "cpu" and dist.get_backend(self._group) == "nccl":  # trainers move models away in the end
            staged = tensor.to(_of_nccl())
            dist.broadcast(staged, group=self._group, group_src=source)
            tensor.copy_(staged)
        else:
            dist.broadcast(tensor, group=self._group, group_src=source)

    def _scatter(self, target: Any, value: Tensor | None, source: int) -> None:
        from torch.distributed.tensor import distribute_tensor

        mesh = target.device_mesh
        if value is None:
            value = torch.empty(target.shape, dtype=target.dtype, device=target.to_local().device)
        value = value.to(target.dtype).contiguous()
        can_scatter = "src_data_rank" in inspect.signature(distribute_tensor).parameters  # not yet in torch 2.6
        if can_scatter and mesh.ndim == 1 and mesh.size() == self.size:
            target.copy_(distribute_tensor(value, mesh, target.placements, src_data_rank=source))
        else:  # such as a mesh of several axes: everyone gets the whole, and keeps its part
            self._broadcast(value, source)
            target.copy_(sharded_like(value, target))
