"""What TRP does at a projection, and what it remembers from one to the next."""

import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from rankprune.distributed import is_sharded, sharded_like
from rankprune.errors import RankPruneError
from rankprune.factorizer import Factored
from rankprune.plan import Plan
from rankprune.planner import Planner
from rankprune.projection import project_factored, subgradients
from rankprune.rules import RankRule
from rankprune.schedule import Schedule
from rankprune.schemes import Key

_UNTRAINED = 0.01
"""The share of a layer's energy that may be cut off in the end, beyond twice what was cut off before, without a warning."""


STATE = frozenset(
    ("layers", "scheme", "ranks_by", "projected_at", "annealed", "plan", "history", "latency", "subgradients", "starts")
)
"""What LowRankIteration.state_dict() holds."""


class LowRankIteration:
    """TRP's low-rank iteration: projects the weights of a model in training; each projection starts from what the last found.

    Args:
        planner: chooses the ranks.
        schedule: says by which rule after how many steps, and from when on ranks are kept.
        nuclear: whether sub-gradients of the nuclear norm are wanted.

    Attributes:
        schedule, nuclear: as given.
        plan: of the last projection; None before the first.
        history: for every projection the step it followed and the rank of each layer it decomposed.
        projected_at: the step that the last projection followed.
        subgradients: in the shapes of their weights, by layer; None where they are not known.
    """

    def __init__(self, planner: Planner, schedule: Schedule, nuclear: bool) -> None:
        self.plan: Plan | None = None
        self.history: list[tuple[int, dict[str, int]]] = []
        self.projected_at: int | None = None
        self.subgradients: dict[str, Tensor] | None = None
        self.schedule, self.nuclear = schedule, nuclear
        self._planner, self._factorizer = planner, planner.factorizer
        self._annealed = True
        self._starts: dict[Key, Tensor] | None = None

    def project(self, steps: int) -> Plan:
        """Choose ranks as is due after so many steps, and project; see TRP.project."""
        rule = self.schedule.rule if self._settled else self.schedule.rule_after(steps)
        return self._project(steps, rule, self._factor(steps, self.nuclear), self.nuclear)

    def finish(self, steps: int) -> Plan:
        """Project for the last time, by the rule in full, and time the network where the rule goes by latency.

        Warns:
            UserWarning: if it cuts off much more than the projection before did, or the network cannot be timed.
        """
        before = self.plan if self._settled else None
        if before is not None and self.projected_at == steps:
            # at the ranks it has; the weights may have been exchanged since, for those of an average, say
            plan, factored = before, self._factorizer.factor(keys=_planned(before))
            project_factored(self._factorizer, plan, factored)
            now = kept = _with_errors(before, factored)
        else:
            factored = self._factor(steps, nuclear=False)
            kept = before and _with_errors(before, factored)
            ramp_goes_on = self._annealed and steps < self.schedule.ramp  # where the training does
            plan = now = self._project(steps, self.schedule.rule, factored, nuclear=False)
            self._annealed = ramp_goes_on
        if before is not None and kept is not None and (more := _cut_more(before, kept, now)):
            warnings.warn(more, stacklevel=3)
        try:
            self.plan = plan = self._planner.timed(plan)
        except RankPruneError as error:
            warnings.warn(f"the decomposed network could not be timed: {error}", stacklevel=3)
        return plan

    def find_subgradients(self) -> None:
        """Those of the weights as they are, where no projection found them: before the first, or after loading a state."""
        names = self._regularised(self.projected_at)
        factored = self._factorizer.factor(keys=self._used(names))
        self.subgradients = subgradients(self._factorizer, self.plan, factored, names)

    def unsettled(self, steps: int) -> str | None:
        """Why the weights have not been projected by the rule in full; None if they have."""
        if self._settled:
            return None
        if not steps:
            return "this TRP has seen no step of an optimizer that it was attached to"
        if steps < self.schedule.ramp:
            return f"the training ended after {steps} steps, before the ramp did at {self.schedule.ramp}"
        return f"the training ended after {steps} steps, before a projection by {self.schedule.rule!r} in full"

    @property
    def _settled(self) -> bool:
        return self.plan is not None and not self._annealed

    def _keeps_ranks(self, steps: int | None) -> bool:
        return steps is not None and self._settled and self.schedule.keeps_ranks_after(steps)

    def _regularised(self, steps: int | None) -> frozenset[str]:
        """The layers whose nuclear norms are held down after so many steps: those of which a pair can still come."""
        if self.plan is not None and self._keeps_ranks(steps):
            return self._planner.decomposable & self.plan.decomposed.keys()
        return self._planner.decomposable

    def _used(self, names: Collection[str]) -> list[Key]:
        """What is read of factors where the plan stays, and sub-gradients of these layers are wanted."""
        planned = [] if self.plan is None else _planned(self.plan)
        unranked = sorted(set(names) - {name for name, _ in planned})
        return planned + [self._factorizer.options[name][0].key for name in unranked]

    def _factor(self, steps: int, nuclear: bool) -> Factored:
        """What a projection after so many steps reads of the weights: where ranks are chosen, of all layers and schemes."""
        planner, factorizer = self._planner, self._factorizer
        if planner.latency is not None and planner.latency.table is None:
            planner.join(factorizer.team)  # not attached
        if self._keeps_ranks(steps):
            return factorizer.factor(self._starts, self._used(self._regularised(steps) if nuclear else ()))
        return factorizer.factor(self._starts)

    def _project(self, steps: int, rule: RankRule, factored: Factored, nuclear: bool) -> Plan:
        planner, factorizer = self._planner, self._factorizer
        if self.plan is not None and self._keeps_ranks(steps):
            self.plan = _with_errors(self.plan, factored)
        else:
            if self._annealed and rule is planner.rule:  # the ranks to come are chosen now, at spectra that training has made
                self._correct_latency(factored)
            self.plan = planner.plan(factored, rule)
            self._annealed = rule is not planner.rule
        names = self._regularised(steps) if nuclear else ()
        terms = project_factored(factorizer, self.plan, factored, names)
        self.subgradients = terms if nuclear else None
        self._starts = factorizer.leading(self.plan, factored)
        self.projected_at = steps
        ranks = self.plan.ranks
        if self.history and self.history[-1][1] == ranks:  # a long training has many projections
            ranks = self.history[-1][1]
        self.history.append((steps, ranks))
        return self.plan

    def _correct_latency(self, factored: Factored) -> None:
        latency = self._planner.latency
        if latency is None:
            return
        table = latency.table
        try:
            self._planner.correct_latency(factored)
            self._planner.plan(factored)
        except RankPruneError as error:  # no reason to give a training up
            latency.table = table
            warnings.warn(f"{error}. That is by times measured in training; ranks go by the earlier ones", stacklevel=2)

    @property
    def standing(self) -> dict[str, Any]:
        """What all processes that train together have in common, as plain values; of the layers also their order."""
        return {
            "layers": list(self._shapes().items()),
            "schemes": self._planner.scheme,
            "rules": self._ranks_by,
            "schedules": (self.schedule.every, self.schedule.ramp, self.schedule.freeze),
            "the step of the last projection": self.projected_at,
            "ramps": self._annealed,
        }

    def state_dict(self) -> dict[str, Any]:
        """What to go on from, as TRP.state_dict has it."""
        table = None if self._planner.latency is None else self._planner.latency.table
        team = self._factorizer.team
        terms = self.subgradients or {}
        whole = team.size == 1 or not any(map(is_sharded, terms.values()))
        return {
            "layers": self._shapes(),
            "scheme": self._planner.scheme,
            "ranks_by": self._ranks_by,
            "projected_at": self.projected_at,
            "annealed": self._annealed,
            "plan": None if self.plan is None else self.plan.to_json(),
            "history": _as_changes(self.history),
            "latency": None if table is None else asdict(table),
            "subgradients": {name: team.whole(term).clone() for name, term in terms.items()} if whole else {},
            "starts": self._starts if team.size == 1 else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from state_dict().

        Raises:
            RankPruneError: as TRP.load_state_dict; nothing is changed then.
        """
        here, there = self._shapes(), state["layers"]
        if state["scheme"] != self._planner.scheme:
            raise RankPruneError(f"this state is of scheme {state['scheme']!r}, not {self._planner.scheme!r}")
        differing = [name for name in {**here, **there} if list(here.get(name, ())) != list(there.get(name, ()))]
        if differing:
            raise RankPruneError(
                f"this state is of another model, or of other include and exclude patterns: it differs in {differing[:3]}"
            )
        plan = None if state["plan"] is None else Plan.from_json(state["plan"])
        if self._planner.latency is not None and state["latency"]:  # what was measured before decides on
            self._planner.latency.load(state["latency"])
        self.plan, self.projected_at, self._annealed = plan, state["projected_at"], state["annealed"]
        self.history = _from_changes(state["history"])
        weights = self._factorizer.weights()
        terms = {
            name: sharded_like(term.to(weights[name].device, copy=True), weights[name])
            for name, term in state["subgradients"].items()
        }
        self.subgradients = terms or None  # those of shards are not in it: all are found anew
        starts = state["starts"]
        self._starts = starts and {(name, scheme): start.to(weights[name].device) for (name, scheme), start in starts.items()}
        if state["ranks_by"] != self._ranks_by:
            self._annealed = True
            warnings.warn(
                f"this state is of a training with {state['ranks_by']}; from the next projection on ranks are chosen by "
                f"{self._ranks_by}",
                stacklevel=3,
            )

    @property
    def _ranks_by(self) -> str:
        said = re.sub(r" at 0x[0-9a-f]+", "", repr(self._planner.rule))  # an address says nothing elsewhere
        return f"{said}, round_to={self._planner.round_to}"

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(layer.module.get_parameter("weight").shape) for name, layer in self._factorizer.layers.items()}


def _with_errors(plan: Plan, factored: Factored) -> Plan:
    """The plan with what its ranks lose of these weights."""
    lost = {name: float(factored.spectra[name, s].errors()[rank]) for name, (s, rank) in plan.choices.items()}
    return replace(plan, layers=tuple(replace(e, error=lost.get(e.name, e.error)) for e in plan.layers))


def _cut_more(before: Plan, kept: Plan, now: Plan) -> str | None:
    """What to tell of a last projection that cuts off much more than the one before it; None if it does not.

    Args:
        kept: the plan before, with what its ranks lose of the weights as they are: ranks that are chosen anew may fall, and
            cut off more, where nothing is wrong.
    """
    errors, as_before = ({entry.name: entry.error for entry in plan.layers} for plan in (before, kept))
    cut = {entry.name: min(entry.error, as_before.get(entry.name, 0.0)) for entry in now.layers}
    worst = max(cut, key=lambda name: cut[name] - 2 * errors.get(name, 0.0))
    if cut[worst] <= 2 * errors.get(worst, 0.0) + _UNTRAINED:
        return None
    return (
        f"the last projection cut off {cut[worst]:.1%} of the energy of layer {worst!r}, the one before it "
        f"{errors[worst]:.2%}: the weights have been changed without this TRP since, by another optimizer, say, or by "
        "loading or averaging, and are truncated more than they were trained for"
    )


def _planned(plan: Plan) -> list[Key]:
    return [(name, scheme) for name, (scheme, _) in plan.choices.items()]


def _as_changes(history: Sequence[tuple[int, dict[str, int]]]) -> list[tuple[int, dict[str, int | None]]]:
    """Of each entry the ranks that are not those of the one before, None for a layer that has none any more."""
    changes, before = [], {}
    for step, ranks in history:
        if ranks is before:  # entries with the same ranks share them
            changes.append((step, {}))
            continue
        gone = dict.fromkeys(before.keys() - ranks.keys())
        changes.append((step, {name: rank for name, rank in ranks.items() if before.get(name) != rank} | gone))
        before = ranks
    return changes


def _from_changes(changes: Sequence[tuple[int, dict[str, int | None]]]) -> list[tuple[int, dict[str, int]]]:
    """The inverse of _as_changes; entries with the same ranks share them."""
    history: list[tuple[int, dict[str, int]]] = []
    ranks: dict[str, int] = {}
    for step, changed in changes:
        if changed:
            ranks = {name: rank for name, rank in (ranks | changed).items() if rank is not None}
        history.append((step, ranks))
    return history
