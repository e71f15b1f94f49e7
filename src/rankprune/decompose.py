"""Replace each planned layer by its pair of thin ones, in a copy of the model."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankprune import linalg
from rankprune.layers import unwrap
from rankprune.plan import Plan
from rankprune.projection import factor_planned, planned_modules
from rankprune.schemes import SCHEMES


@torch.no_grad()
def decompose(model: nn.Module, plan: Plan) -> nn.Module:
    """A new model in which every planned layer is an ``nn.Sequential`` of two stock layers; `model` is untouched.

    A model whose weights already have the plan's ranks (after TRP) computes the same as before, up to rounding. No
    fine-tuning is involved. compile and DataParallel wrappers are taken off.

    Raises:
        RankPruneError: if the plan does not fit the model.
        FactorizationError: if a weight is not finite.

    >>> from rankprune.planner import make_plan
    >>> from rankprune.ranks import FixedRank
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 10))
    >>> decompose(model, make_plan(model, rule=FixedRank(4)))
    Sequential(
      (0): Sequential(
        (0): Linear(in_features=64, out_features=4, bias=False)
        (1): Linear(in_features=4, out_features=32, bias=True)
      )
      (1): Linear(in_features=32, out_features=10, bias=True)
    )
    """
    model = unwrap(model)
    bases = factor_planned(model, plan)
    pairs = {}
    for name, module in planned_modules(model, plan).items():
        entry = plan.decomposed[name]
        scheme = SCHEMES[entry.scheme or ""]
        matrices = scheme.to_matrices(module, module.get_parameter("weight"))
        pairs[name] = scheme.pair(module, *linalg.factors(matrices, bases[name, scheme.name], entry.rank or 1))
    return _with_pairs(model, plan, pairs)


def skeleton(model: nn.Module, plan: Plan) -> nn.Module:
    """The decomposed model's structure with uninitialised pairs: what a checkpoint is loaded into. `model` is untouched.

    Raises:
        RankPruneError: if the plan does not fit the model.
    """
    model = unwrap(model)
    pairs = {}
    for name, module in planned_modules(model, plan).items():
        entry = plan.decomposed[name]
        pairs[name] = SCHEMES[entry.scheme or ""].pair_like(module, entry.rank or 1)
    return _with_pairs(model, plan, pairs)


def _with_pairs(model: nn.Module, plan: Plan, pairs: Mapping[str, nn.Module]) -> nn.Module:
    """A deep copy of the model with each planned layer's pair wherever the layer was referred to, also twice."""
    modules = planned_modules(model, plan)
    memo: dict[int, Any] = {id(modules[name]): pair for name, pair in pairs.items()}
    for module in model.modules():  # weight_norm and the like keep a computed weight, which deepcopy refuses
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    small = copy.deepcopy(model, memo)
    for module in small.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and {type(module.linear1), type(module.linear2)} != {nn.Linear}:
            module.activation_relu_or_gelu = 0  # keeps it off its fast path, which reads linear1.weight
    return small
