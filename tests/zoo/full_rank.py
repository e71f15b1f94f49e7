"""A plan that loses nothing: every layer that can be decomposed, at its full rank."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

import rankprune as rp
from rankprune.plan import LayerPlan
from rankprune.schemes import schemes_for
from zoo.architecture import Inputs


def full_rank_plan(model: nn.Module, x: Inputs, scheme: str, exclude: Sequence[str] = ()) -> rp.Plan:
    """Every layer that `scheme` can express, also where its pair costs more; with "auto" the schemes take turns."""
    plan = rp.make_plan(model, x, scheme=scheme, rule=rp.FixedRank(1), include=["*"], exclude=exclude)
    modules = dict(model.named_modules())
    entries: list[LayerPlan] = []
    for place, entry in enumerate(plan.layers):
        if entry.rank is not None or " costs " in (entry.reason or ""):
            layer = modules[entry.name]
            fitting, _ = schemes_for(scheme, layer)
            chosen = fitting[place % len(fitting)]
            entry = replace(entry, scheme=chosen.name, rank=chosen.full_rank(layer), reason=None)
        entries.append(entry)
    return replace(plan, layers=tuple(entries))
