"""Make the weights of a dense model low-rank, in place, at the ranks of a plan."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankprune import linalg
from rankprune.distributed import is_sharded
from rankprune.errors import RankPruneError
from rankprune.factorizer import Factored, Factorizer
from rankprune.layers import own_weight, unfactorable
from rankprune.linalg import Basis
from rankprune.plan import LayerPlan, Plan
from rankprune.schemes import SCHEMES, Key
from rankprune.survey import Option
from rankprune.wrappers import named_modules, own_type, unwrap


def planned_modules(model: nn.Module, entries: Mapping[str, LayerPlan]) -> dict[str, nn.Module]:
    """The modules of some of a plan's layers, by name.

    Raises:
        RankPruneError: if the model has no such module, or one of another type or shape.
    """
    modules = named_modules(model)
    found = {}
    for name, entry in entries.items():
        module = modules.get(name)
        if module is None:
            raise RankPruneError(f"the plan names a layer {name!r}, which this {type(model).__name__} does not have")
        weight = own_weight(module)
        if isinstance(weight, nn.UninitializedParameter):
            raise RankPruneError(f"layer {name!r} is lazy and has no shape yet; run one forward pass first")
        if weight is not None and is_sharded(weight):
            raise RankPruneError(
                f"the weight of layer {name!r} is sharded over processes; TRP.finalize(into=...) puts it together, or load the "
                "full state into a fresh dense model"
            )
        shape = None if weight is None else tuple(weight.shape)
        if own_type(module).__name__ != entry.kind or shape != entry.shape:
            raise RankPruneError(
                f"the plan has layer {name!r} as {entry.kind} with a weight of shape {entry.shape}; this model has "
                f"{own_type(module).__name__} with {shape}: make a new plan for it"
            )
        scheme = SCHEMES.get(entry.scheme or "")
        if scheme is None or scheme.unsupported(module):
            known = ", ".join(s.name for s in SCHEMES.values() if not s.unsupported(module))
            raise RankPruneError(f"the plan gives layer {name!r} the scheme {entry.scheme!r}; it can have {known}")
        full_rank = scheme.full_rank(module)
        if not 1 <= (entry.rank or 0) <= full_rank:
            raise RankPruneError(f"the plan gives layer {name!r} the rank {entry.rank}; it can have 1 to {full_rank}")
        found[name] = module
    return found


def planned_spectra(model: nn.Module, plan: Plan) -> dict[str, list[float]]:
    """Of every layer to be decomposed the singular values by the largest, descending; over a stack their root mean square."""
    spectra, modules = {}, planned_modules(model, plan.decomposed)
    for stacks in planned_matrices(modules, plan):
        for (name, _), basis in linalg.bases_by_layer(stacks).items():
            values = basis.values.square().mean(0).sqrt()
            spectra[name] = (values / values[0].clamp(min=torch.finfo(values.dtype).tiny)).tolist()
    return spectra


def planned_matrices(modules: Mapping[str, nn.Module], plan: Plan) -> Iterator[dict[Key, Tensor]]:
    """The weights of the planned modules as stacks of matrices, by (layer, scheme), as many at a time as should be factored."""
    weights = {name: module.get_parameter("weight").detach() for name, module in modules.items()}
    for name, weight in weights.items():
        if place := unfactorable(weight):
            raise RankPruneError(f"the weight of layer {name!r} is {place}; put the model on the CPU, with its values")
    schemes = {name: plan.choices[name][0] for name in modules}
    for part in linalg.in_parts({name: weight.numel() for name, weight in weights.items()}):
        yield {(name, schemes[name]): SCHEMES[schemes[name]].to_matrices(modules[name], weights[name]) for name in part}


@torch.no_grad()
def project(model: nn.Module, plan: Plan) -> None:
    """Replace each planned weight by its nearest one of the planned rank (TRP's low-rank iteration), in place.

    The parameters stay the same objects, so optimizers and compiled models go on as before.

    Raises:
        RankPruneError: if the plan does not fit the model.
        FactorizationError: if a weight is not finite.
    """
    modules = planned_modules(unwrap(model), plan.projected)
    for stacks in planned_matrices(modules, plan):
        for (name, scheme), basis in linalg.bases_by_layer(stacks).items():
            low = linalg.project(stacks[name, scheme], basis, plan.choices[name][1])
            modules[name].get_parameter("weight").copy_(SCHEMES[scheme].to_weight(modules[name], low))


@torch.no_grad()
def project_factored(factorizer: Factorizer, plan: Plan, factored: Factored, names: Collection[str] = ()) -> dict[str, Tensor]:
    """As project, for the weights that `factored` is of; every process of the team computes those it owns.

    Those of `names` that the plan gives no rank, though leading vectors were known, are factored whole, into `factored`.

    Returns:
        subgradients() of the layers in `names`, which cost less at once than apart.
    """
    factorizer.complete(factored, [factorizer.options[name][0].key for name in names if name not in plan.projected])

    def compute() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        low, own = {}, {}
        for owned in _owned(factorizer, plan, factored):
            if owned.name in names:
                projected, term = linalg.project_with_subgradient(owned.stack, owned.basis, owned.rank)
                own[owned.name] = owned.as_weight(term)
            elif owned.rank is None:
                continue
            else:
                projected = linalg.project(owned.stack, owned.basis, owned.rank)
            if owned.rank is not None:
                low[owned.name] = owned.as_weight(projected)
        return low, own

    low, own = factorizer.team.together(compute)
    weights = factorizer.weights()
    factorizer.team.publish({name: weights[name] for name in plan.projected}, low, factorizer.owner)
    return _gathered(factorizer, own, names)


@torch.no_grad()
def subgradients(factorizer: Factorizer, plan: Plan | None, factored: Factored, names: Collection[str]) -> dict[str, Tensor]:
    """For each layer in `names` U V^T in the shape of its weight; every process of the team computes those it owns.

    Of a layer that the plan gives a rank it is taken over the ranks it keeps, of others over all.
    """

    def compute() -> dict[str, Tensor]:
        return {
            owned.name: owned.as_weight(linalg.nuclear_subgradient(owned.stack, owned.basis, owned.rank))
            for owned in _owned(factorizer, plan, factored)
            if owned.name in names
        }

    return _gathered(factorizer, factorizer.team.together(compute), names)


def _gathered(factorizer: Factorizer, own: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    terms = {name: torch.empty_like(weight) for name, weight in factorizer.weights().items() if name in names}
    factorizer.team.publish(terms, own, factorizer.owner)
    return terms


@dataclass(frozen=True)
class _Owned:
    """A layer that this process factored, under the scheme in question; the planned rank is None where there is none."""

    name: str
    option: Option
    stack: Tensor
    basis: Basis
    rank: int | None

    def as_weight(self, stack: Tensor) -> Tensor:
        return self.option.scheme.to_weight(self.option.layer.module, stack)


def _owned(factorizer: Factorizer, plan: Plan | None, factored: Factored) -> Iterator[_Owned]:
    for name, options in factorizer.options.items():
        scheme, rank = (None, None) if plan is None else plan.choices.get(name, (None, None))
        option = next((o for o in options if o.scheme.name == scheme), options[0])
        key = name, option.scheme.name
        if key in factored.bases:
            yield _Owned(name, option, factored.stacks[key], factored.bases[key], rank)
