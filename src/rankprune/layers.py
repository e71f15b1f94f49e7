"""Which layers of a model can be decomposed, and why the others cannot."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rankprune.distributed import is_sharded
from rankprune.errors import RankPruneError
from rankprune.schemes import CONVOLUTIONS, is_linear
from rankprune.schemes.base import Convolution, padded_sides
from rankprune.wrappers import has_hooks, named_modules, own_type

_KINDS: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear)


@dataclass(frozen=True)
class Layer:
    """A module that may be decomposed, by its first name in the model."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Skipped:
    """A module that holds a weight matrix and stays as it is, and why."""

    name: str
    module: nn.Module
    reason: str


@dataclass(frozen=True)
class Selection:
    """The outcome of select: layers to decompose, and modules left alone, both in the model's order."""

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]


def is_decomposable(module: nn.Module) -> bool:
    """Whether some scheme knows this very type; a subclass may compute something else in its forward."""
    return own_type(module) in CONVOLUTIONS or is_linear(module)


def select(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    calls: Mapping[str, str | None] | None = None,
) -> Selection:
    """Sort the modules of `model` that hold a weight of two or more axes into layers and skipped ones.

    Only plain ``nn.Conv*``, ``nn.ConvTranspose*`` and ``nn.Linear`` qualify, and the Conv1D of transformers. The first
    convolution and the last Linear stay dense unless an include pattern names them.

    Args:
        include: shell patterns on module names; only layers that match one are taken. None takes all but the two above.
        exclude: shell patterns of layers to leave dense.
        calls: for each module that ran in a trial forward pass, where there was one, why a pair could not stand in for it, or
            None. A layer that did not run is skipped too, since somebody may read its weight directly.

    Raises:
        RankPruneError: if a pattern matches no layer, or the model has nothing to decompose.
    """
    include = [include] if isinstance(include, str) else include
    exclude = [exclude] if isinstance(exclude, str) else exclude or ()
    modules = named_modules(model)
    holders = {name: m for name, m in modules.items() if _holds_matrix(m)}
    shared = _shared_parameters(modules)
    reasons = {name: _unfit(name, m, shared, calls) for name, m in holders.items()}
    fit = [name for name, reason in reasons.items() if reason is None]
    for kind, patterns in (("include", include or ()), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in holders):
                known = ", ".join(list(holders)[:6]) or "none"
                raise RankPruneError(
                    f"{kind} pattern {pattern!r} matches no layer; layers are named like {known}; patterns use *, ? and []"
                )
    ends = _first_convolution_and_last_linear(holders) if include is None else {}
    for name in fit:
        if include is not None and not any(fnmatchcase(name, p) for p in include):
            reasons[name] = "not named by an include pattern"
        elif pattern := next((p for p in exclude if fnmatchcase(name, p)), None):
            reasons[name] = f"excluded by the pattern {pattern!r}"
        else:
            reasons[name] = ends.get(name)
    layers = tuple(Layer(name, holders[name]) for name, reason in reasons.items() if reason is None)
    skipped = tuple(Skipped(name, holders[name], reason) for name, reason in reasons.items() if reason is not None)
    if not layers:
        asked = sorted(skipped, key=lambda s: not any(fnmatchcase(s.name, p) for p in include or ()))
        why = "; ".join(f"{s.name}: {s.reason}" for s in asked[:4]) or "it holds no convolution and no linear layer"
        raise RankPruneError(f"{type(model).__name__} has no layer to decompose ({why}); see include= and exclude=")
    return Selection(layers, skipped)


NORMS = nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm
"""Modules that scale each value by itself, whatever shape their weight has."""


def unfactorable(weight: Tensor) -> str | None:
    """Where a weight is that cannot be factored there, or None."""
    if weight.is_meta:
        return "on the meta device and holds no values"
    return "on an MPS device, which has no float64 to factor it in" if weight.device.type == "mps" else None


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """The module's parameter `weight`, if it has one that is a parameter of its own."""
    return dict(module._parameters.items()).get("weight")


def _holds_matrix(module: nn.Module) -> bool:
    """Whether the module itself, not a child, owns a weight that a decomposition could be about."""
    if isinstance(module, _KINDS):
        return True
    if isinstance(module, NORMS):
        return False
    own = [p for _, p in module._parameters.items() if p is not None]
    return is_packed(module) or any(isinstance(p, nn.UninitializedParameter) or is_matrix(p) for p in own)


def is_packed(module: nn.Module) -> bool:
    """Whether it is a quantized layer, which keeps its weight behind a method. Computes no weight that is parametrized."""
    method = inspect.isfunction(inspect.getattr_static(type(module), "weight", None))
    return method and getattr(module, "_packed_params", None) is not None


def is_matrix(parameter: Tensor) -> bool:
    """Whether it is longer than 1 along two axes or more; scales of shape (c, 1, 1) and class tokens (1, 1, c) are vectors."""
    return sum(length > 1 for length in parameter.shape) >= 2


@dataclass(frozen=True)
class _Span:
    """Where in memory a parameter of a module is; one without memory to tell it by is known by itself alone."""

    holder: str
    attribute: str
    storage: int
    start: int
    end: int

    @classmethod
    def of(cls, holder: str, attribute: str, parameter: nn.Parameter) -> "_Span":
        if is_lazy(parameter) or type(parameter.data) is not Tensor or parameter.layout != torch.strided or parameter.is_meta:
            return cls(holder, attribute, -id(parameter), 0, 1)
        length = 1 + sum((n - 1) * step for n, step in zip(parameter.shape, parameter.stride(), strict=True))
        start = parameter.data_ptr()
        return cls(holder, attribute, parameter.untyped_storage().data_ptr(), start, start + length * parameter.element_size())


def _shared_parameters(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Name of a module -> which of its parameters another module holds, too, or has in the same memory, and which one."""
    spans = [
        _Span.of(name, attribute, parameter)
        for name, module in modules.items()
        for attribute, parameter in module._parameters.items()
        if parameter is not None and (is_lazy(parameter) or parameter.numel())
    ]
    overlapping: list[list[_Span]] = []
    storage, reached = None, 0
    for span in sorted(spans, key=lambda s: (s.storage, s.start)):  # of one start in the model's order
        if span.storage != storage or span.start >= reached:
            overlapping.append([])
            storage, reached = span.storage, 0
        overlapping[-1].append(span)
        reached = max(reached, span.end)
    groups = {span: group for group in overlapping for span in group}
    shared: dict[str, str] = {}
    for span in spans:
        if other := next((s.holder for s in groups[span] if s.holder != span.holder), None):
            shared.setdefault(span.holder, f"its {span.attribute} is shared with {other!r}")
    return shared


def _unfit(name: str, module: nn.Module, shared: dict[str, str], calls: Mapping[str, str | None] | None) -> str | None:
    """Why this module cannot be decomposed whatever the scheme, or None."""
    kind = own_type(module).__name__
    weight = own_weight(module)
    if isinstance(weight, nn.UninitializedParameter):
        return f"{kind} has no shape yet; run one forward pass first"
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first (torch.nn.utils.parametrize)"
    if not is_decomposable(module):
        base = next((t.__name__ for t in _KINDS if isinstance(module, t)), None)
        return f"{kind} is a subclass of {base} and may compute something else" if base else f"{kind} layers are not supported"
    if weight is None:
        return "its weight is computed from other parameters (weight_norm, spectral_norm or pruning); remove that first"
    if name in shared:
        return shared[name]
    if not weight.dtype.is_floating_point or torch.finfo(weight.dtype).bits < 16:
        return f"its weight is of dtype {weight.dtype}"
    if type(weight.data) is not Tensor and not is_sharded(weight):
        return f"its weight is a {type(weight.data).__name__}, no plain tensor"
    if weight.layout != torch.strided:
        return f"its weight is of layout {weight.layout}"
    if isinstance(module, Convolution) and (reason := _inconsistent(module, weight)):
        return reason
    if place := unfactorable(weight):
        return f"its weight is {place}"
    if weight.numel() == 0:
        return "its weight is empty"
    if more := _beyond_weight_and_bias(module):
        return f"it holds {', '.join(more)}, for which a pair of layers has no place"
    if has_hooks(module):
        return "it has forward or backward hooks, which a replacement would lose"
    if "forward" in module.__dict__:
        return "its forward has been replaced on the instance"
    if calls is not None and name not in calls:
        return "it does not run in the forward pass on the example inputs; its weight may be used in another way"
    return None if calls is None else calls[name]


def _beyond_weight_and_bias(module: nn.Module) -> list[str]:
    """The names of tensors and modules that a decomposable layer was given; of its bias, too, where that is no parameter."""
    parameters = [name for name, p in module._parameters.items() if p is not None and name not in ("weight", "bias")]
    buffers = [name for name, b in module._buffers.items() if b is not None]
    plain = ["bias"] if module.__dict__.get("bias") is not None else []
    return parameters + buffers + plain + [name for name, _ in module.named_children()]


def _inconsistent(layer: Convolution, weight: Tensor) -> str | None:
    """Which of a convolution's attributes, which may have been set after it was built, do not go together; None if all do."""
    if tuple(weight.shape) != _shape_of(layer):
        return f"its weight of shape {tuple(weight.shape)} is not what its other attributes say: {_shape_of(layer)}"
    numbers = {name: getattr(layer, name) for name in ("stride", "dilation", "padding", "output_padding")}
    for name, value in numbers.items():
        if not isinstance(value, str) and (not isinstance(value, Sequence) or len(value) != len(layer.kernel_size)):
            return f"its {name} is {value!r}, not {len(layer.kernel_size)} numbers"
    if isinstance(layer.padding, str) and layer.padding not in ("same", "valid"):
        return f"its padding is {layer.padding!r}, neither numbers nor 'same' nor 'valid'"
    if layer.padding == "same" and max(layer.stride) > 1:
        return "its padding is 'same', which does not go with a stride"
    if layer.padding_mode != "zeros" and list(layer._reversed_padding_repeated_twice) != padded_sides(layer):
        return f"its padding was changed after it was built, which padding_mode={layer.padding_mode!r} ignores"
    return None


def _shape_of(layer: Convolution) -> tuple[int, ...]:
    """The shape of a convolution's weight by the sizes that its pair would be built from."""
    first, second = (layer.in_channels, layer.out_channels) if layer.transposed else (layer.out_channels, layer.in_channels)
    return first, second // layer.groups, *layer.kernel_size


def _first_convolution_and_last_linear(holders: dict[str, nn.Module]) -> dict[str, str]:
    convolutions = [name for name, m in holders.items() if isinstance(m, tuple(CONVOLUTIONS))]
    linears = [name for name, m in holders.items() if isinstance(m, nn.Linear)]
    reasons = {}
    if convolutions:
        reasons[convolutions[0]] = "the first convolution stays dense unless an include pattern names it"
    if linears:
        reasons[linears[-1]] = "the last Linear stays dense unless an include pattern names it"
    return reasons
