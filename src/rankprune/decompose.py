"""Replace each planned layer by its pair of thin ones, in a copy of the model."""

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from rankprune import linalg
from rankprune.calibration import whitened, whitenings
from rankprune.errors import RankPruneError
from rankprune.inputs import Inputs
from rankprune.plan import Plan
from rankprune.projection import planned_matrices, planned_modules
from rankprune.replacement import with_pairs
from rankprune.schemes import SCHEMES
from rankprune.wrappers import has_hooks, unwrap


@torch.inference_mode(False)
@torch.no_grad()
def decompose(model: nn.Module, plan: Plan, *, calibration: Iterable[Inputs] | None = None) -> nn.Module:
    """A new model in which every planned layer is an ``nn.Sequential`` of two stock layers; `model` is untouched.

    A model whose weights already have the plan's ranks (after TRP) computes the same as before, up to rounding. No
    fine-tuning is involved. compile and DataParallel wrappers are taken off.

    Args:
        calibration: inputs to run the model on, like example_inputs. Given, the factors lose least in the layers' outputs on
            these inputs, instead of in the weights.

    Raises:
        RankPruneError: if it is no Plan or does not fit the model, or calibration is empty.
        FactorizationError: if a weight is not finite.

    Warns:
        UserWarning: if planned layers have hooks, which they lose, or if the plan was calibrated and this is not.

    >>> from rankprune.planner import make_plan
    >>> from rankprune.rules import FixedRank
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
    if not isinstance(plan, Plan):  # where a rule stands, or the plan of a TRP before its first projection, which is None
        raise RankPruneError(f"decompose() takes a Plan, of make_plan() or of a TRP that has projected, not {plan!r}")
    model = unwrap(model)
    modules = planned_modules(model, plan.decomposed)
    if hooked := [name for name, module in modules.items() if has_hooks(module)]:
        warnings.warn(
            f"layers {', '.join(hooked[:3])} have got hooks since the plan was made; their pairs lose them", stacklevel=3
        )
    if plan.calibrated and calibration is None:
        warnings.warn(
            "the ranks of this plan were chosen by the layers' outputs on calibration inputs; without calibration= here too, "
            "the weights alone are truncated at them, which may lose far more",
            stacklevel=3,
        )
    keys = [(name, plan.choices[name][0]) for name in modules]
    layers = {(name, scheme): (modules[name], SCHEMES[scheme]) for name, scheme in keys}
    pairs = {}
    for part, whites in [(keys, {})] if calibration is None else whitenings(model, layers, calibration):
        for stacks in planned_matrices({name: modules[name] for name, _ in part}, plan):
            stacks = whitened(stacks, whites)
            for key, basis in linalg.bases_by_layer(stacks).items():
                left, right = linalg.factors(stacks[key], basis, plan.choices[key[0]][1])
                module, scheme = layers[key]
                pairs[key[0]] = scheme.pair(module, *(whites[key].undo(left, right) if key in whites else (left, right)))
        del whites  # before the next are made
    return with_pairs(model, modules, pairs)


def skeleton(model: nn.Module, plan: Plan) -> nn.Module:
    """The decomposed model's structure with uninitialised pairs: what a checkpoint is loaded into. `model` is untouched.

    Raises:
        RankPruneError: if the plan does not fit the model.
    """
    model = unwrap(model)
    modules, pairs = planned_modules(model, plan.decomposed), {}
    for name, module in modules.items():
        scheme, rank = plan.choices[name]
        pairs[name] = SCHEMES[scheme].pair_like(module, rank)
    return with_pairs(model, modules, pairs)
