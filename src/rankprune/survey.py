"""What there is to choose from: the layers of a model under each scheme they can have, with what a rank of each costs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rankprune.cost import LayerCost, count, pair_macs, parameter_count
from rankprune.errors import RankPruneError
from rankprune.inputs import Inputs, tensors
from rankprune.latency import Subject, ranks_to_try
from rankprune.layers import Layer, own_weight, select
from rankprune.plan import LayerPlan
from rankprune.rules import Cost, Metric, break_even
from rankprune.schemes import Key, Scheme, schemes_for
from rankprune.wrappers import named_modules, own_type, refuse_flat


@dataclass(frozen=True)
class Option:
    """A layer under one scheme, with the cost of one rank. What does not change while the weights train."""

    layer: Layer
    scheme: Scheme[Any]
    unit: Cost
    dense: Cost
    full_rank: int
    input_shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def key(self) -> Key:
        """The names of layer and scheme."""
        return self.layer.name, self.scheme.name

    def pays(self, metric: Metric, round_to: int) -> bool:
        """Whether a pair of the least rank is cheaper than the layer."""
        return min(round_to, self.full_rank) <= break_even(self.dense, self.unit, metric)


@dataclass(frozen=True)
class Survey:
    """All layers that hold a weight matrix.

    `options` are those that may be decomposed, one for each scheme; `dense` the entry in a plan of every layer as it is, in the
    model's order; `cost` that of the whole model; `uncounted` names modules whose MACs are missing from it.
    """

    cost: Cost
    uncounted: tuple[str, ...]
    options: dict[str, list[Option]] = field(default_factory=dict)
    dense: dict[str, LayerPlan] = field(default_factory=dict)


def survey(
    model: nn.Module, scheme: str, example_inputs: Inputs | None, include: Sequence[str] | None, exclude: Sequence[str]
) -> Survey:
    """Select layers and schemes, and count their costs. Arguments as in Planner.

    Raises:
        RankPruneError: for an unknown scheme, a pattern that matches nothing, a model without a layer to decompose, or example
            inputs without an example.
    """
    refuse_flat(model)
    counted = None if example_inputs is None else count(model, example_inputs)
    if counted and not counted.macs and not all(tensor.numel() for tensor in tensors(example_inputs)):
        raise RankPruneError("the example inputs are empty, so nothing can be counted on them; give at least one example")
    costs = {row.name: row for row in counted.layers} if counted else {}
    calls = {name: row.obstacle for name, row in costs.items() if row.calls} if counted else None
    selection = select(model, include, exclude, calls)
    found = Survey(Cost(counted.macs if counted else None, parameter_count(model)), counted.uncounted if counted else ())
    entries = {s.name: _entry(s.name, s.module, costs.get(s.name), s.reason) for s in selection.skipped}
    for layer in selection.layers:
        schemes, reason = schemes_for(scheme, layer.module)
        row = costs.get(layer.name)
        if schemes:
            found.options[layer.name] = [_option(layer, s, row) for s in schemes]
        entries[layer.name] = _entry(layer.name, layer.module, row, reason)
    found.dense.update({name: entries[name] for name in named_modules(model) if name in entries})
    if not found.options:
        why = "; ".join(f"{layer.name}: {entries[layer.name].reason}" for layer in selection.layers[:4])
        raise RankPruneError(f"scheme {scheme!r} can express none of the layers ({why}); try scheme='auto'")
    return found


def subject(options: Sequence[Option], count: int, round_to: int) -> Subject:
    """A layer to be timed, at about `count` ranks of each scheme that save MACs."""
    ranks = {}
    for o in options:
        ranks[o.scheme] = ranks_to_try(min(o.full_rank, break_even(o.dense, o.unit, "macs")), count, round_to)
    return Subject(options[0].layer.module, options[0].input_shapes, ranks)


def _option(layer: Layer, scheme: Scheme[Any], row: LayerCost | None) -> Option:
    pair = scheme.empty_pair(layer.module, 1).to("meta")
    unit = Cost(pair_macs(pair, row.input_shapes) if row else None, sum(half.get_parameter("weight").numel() for half in pair))
    dense = Cost(row.macs if row else None, layer.module.get_parameter("weight").numel())
    return Option(layer, scheme, unit, dense, scheme.full_rank(layer.module), row.input_shapes if row else ())


def _entry(name: str, module: nn.Module, row: LayerCost | None, reason: str | None) -> LayerPlan:
    """The plan's entry of a module that stays as it is."""
    weight = own_weight(module)
    params = parameter_count(module, recurse=False)
    macs = row.macs if row else None
    return LayerPlan(
        name=name,
        kind=own_type(module).__name__,
        shape=() if weight is None or isinstance(weight, nn.UninitializedParameter) else tuple(weight.shape),
        scheme=None,
        rank=None,
        full_rank=None,
        macs_before=macs,
        macs_after=macs,
        params_before=params,
        params_after=params,
        error=0.0,
        reason=reason,
    )
