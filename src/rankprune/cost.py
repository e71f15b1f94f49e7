"""What a model costs: multiply-accumulates, counted by running it, and parameters. The model is left as it was."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rankprune.columns import aligned
from rankprune.errors import RankPruneError
from rankprune.inputs import Inputs, cloned, tried
from rankprune.layers import NORMS, is_decomposable, is_matrix, is_packed
from rankprune.passes import uncompiled
from rankprune.wrappers import named_modules, own_type, unwrap

_OF_A_PAIR = frozenset(dir(nn.Sequential()))
"""The attributes that a pair of layers has."""


@dataclass(frozen=True)
class LayerCost:
    """One module without children: its type, MACs over all its calls, parameters, and the shape of its input in each call.

    `obstacle` tells why a pair of layers could not stand in for the module in this run, or is None.
    """

    name: str
    kind: str
    macs: int
    params: int
    input_shapes: tuple[tuple[int, ...], ...]
    obstacle: str | None = None

    @property
    def calls(self) -> int:
        """How often the module ran in one forward pass."""
        return len(self.input_shapes)


@dataclass(frozen=True)
class Count:
    """The cost of one forward pass.

    `macs` counts one multiply-add as one, for the whole batch given. `functional_macs` is the part of it that no leaf module
    did (attention products, torch.matmul in a forward). `uncounted` names modules that ran but that the counter is blind to.
    """

    macs: int
    params: int
    layers: tuple[LayerCost, ...]
    functional_macs: int
    uncounted: tuple[str, ...]

    def __str__(self) -> str:
        """A table with a row for each module that costs anything, and the totals."""
        rows = [(r.name or "(model)", r.kind, f"{r.macs:,}", f"{r.params:,}") for r in self.layers if r.macs or r.params]
        lines = aligned([("layer", "type", "MACs", "params"), *rows], "<<>>")
        lines.append(f"MACs {self.macs:,} (outside of modules: {self.functional_macs:,}), parameters {self.params:,}")
        if self.uncounted:
            lines.append(f"not counted: {', '.join(self.uncounted)}")
        return "\n".join(lines)


def count(model: nn.Module, x: Inputs) -> Count:
    """Count the multiply-accumulates and parameters of `model` by running it once on `x` in eval mode.

    The counting is PyTorch's own (MACs are half its FLOPs). Two of its blind spots are repaired, fused attention on
    the CPU and the fast path of MultiheadAttention; what it cannot see (recurrent layers, quantized layers) is named in
    `Count.uncounted`.

    Args:
        x: a tensor, a tuple of positional arguments or a dict of keyword arguments, on the model's device.

    >>> import torch
    >>> count(torch.nn.Linear(8, 4), torch.zeros(2, 8)).macs
    64
    """
    model = unwrap(model)
    leaves = {name: m for name, m in named_modules(model).items() if next(m.children(), None) is None or is_packed(m)}
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in leaves}
    flops = dict.fromkeys(leaves, 0)
    obstacles: dict[str, str] = {}
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        for name, module in leaves.items():
            before: list[int] = []  # empty while the module does not run

            def read(attribute: str, before: list[int] = before, name: str = name) -> None:
                if not before:
                    obstacles[name] = f"other code reads its {attribute!r}, which a pair of layers does not have"

            def enter(_: nn.Module, args: tuple, kwargs: dict, before: list[int] = before, name: str = name) -> None:
                if any(isinstance(p, nn.UninitializedParameter) for p in leaves[name].parameters()):
                    raise RankPruneError(f"layer {name!r} is lazy and has no shape yet; run one forward pass first")
                before.append(counter.get_total_flops())
                if len(args) + len(kwargs) != 1 or not kwargs.keys() <= {"input"}:
                    obstacles[name] = "it is called with more than one argument, like output_size, which a pair does not take"
                first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
                shapes[name].append(tuple(first.shape) if first is not None else ())

            def leave(_: nn.Module, args: tuple, output: Any, before: list[int] = before, name: str = name) -> None:
                flops[name] += counter.get_total_flops() - before.pop()

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
            stack.enter_context(_watched(module, read))
        stack.enter_context(uncompiled(model))
        stack.enter_context(_without_gradients(model))
        if all(p.device.type == "cpu" for p in model.parameters()):  # whose own kernels the counter does not know
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(counter)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)  # of the counter's own hooks
        tried(model, cloned(x))
    rows = tuple(
        LayerCost(name, own_type(m).__name__, flops[name] // 2, parameter_count(m), tuple(shapes[name]), obstacles.get(name))
        for name, m in leaves.items()
        if shapes[name] or parameter_count(m)
    )
    macs = counter.get_total_flops() // 2
    blind = tuple(row.name for row in rows if row.calls and not row.macs and _should_count(leaves[row.name]))
    return Count(macs, parameter_count(model), rows, macs - sum(row.macs for row in rows), blind)


@contextmanager
def _watched(module: nn.Module, read: Callable[[str], None]) -> Iterator[None]:
    """Call `read` with the name of every attribute that is read of a decomposable layer and that a pair of layers lacks."""
    if not is_decomposable(module):
        yield
        return
    kind = type(module)

    def tell(layer: nn.Module, attribute: str) -> Any:
        if attribute not in _OF_A_PAIR and not _reads_to_shard(sys._getframe(1)):
            read(attribute)
        return kind.__getattribute__(layer, attribute)

    module.__class__ = type(kind.__name__, (kind,), {"__getattribute__": tell, "__module__": kind.__module__})
    try:
        yield
    finally:
        module.__class__ = kind


def _reads_to_shard(frame: FrameType) -> bool:
    """Whether this is FSDP's own code or ours, which puts weights together and apart; wrappers read for others."""
    inside = frame.f_globals.get("__name__", "").startswith(("torch.distributed.", "rankprune.distributed"))
    return inside and frame.f_code.co_name != "__getattr__"


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Parameters that want no gradients: the counter fails on views of those that do, even under no_grad.

    Those made in inference mode may stay as they are, and could not be put back.
    """
    lazy = nn.UninitializedParameter
    wanting = [p for p in model.parameters() if p.requires_grad and not isinstance(p, lazy) and not p.is_inference()]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def parameter_count(module: nn.Module, recurse: bool = True) -> int:
    """How many parameters a module holds; lazy ones, which have no shape yet, count as none."""
    return sum(p.numel() for p in module.parameters(recurse) if not isinstance(p, nn.UninitializedParameter))


def _should_count(module: nn.Module) -> bool:
    """Whether a leaf that ran and showed no MACs probably did some: it holds a matrix, and that only to multiply by."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag, *NORMS)):
        return False
    return any(is_matrix(p) for p in module.parameters()) or is_packed(module)


def pair_macs(pair: nn.Module, input_shapes: tuple[tuple[int, ...], ...]) -> int:
    """MACs of a module on the meta device, over one call for each input shape."""
    counter = FlopCounterMode(display=False)
    dtype = next(pair.parameters()).dtype
    with counter, torch.no_grad():
        for shape in input_shapes:
            pair(torch.empty(shape, device="meta", dtype=dtype))
    return counter.get_total_flops() // 2
