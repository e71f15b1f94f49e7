"""Trained Rank Pruning: hooks around an optimizer's step that keep a network on the way to low rank. No mathematics in here."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from rankprune.cost import Inputs
from rankprune.decompose import decompose
from rankprune.distributed import Team, is_sharded, reshard, sharded_like
from rankprune.errors import RankPruneError
from rankprune.layers import unwrap
from rankprune.optimizer_step import Outermost, add_to_gradients, after_closure, has_closure, overflowed
from rankprune.plan import Plan
from rankprune.planner import Factored, Planner
from rankprune.projection import project_factored, project_with_subgradients, subgradients
from rankprune.ranks import RankRule
from rankprune.schedule import Schedule
from rankprune.stopwatch import Stopwatch
from rankprune.survey import Key

_ATTACHED: "WeakKeyDictionary[Optimizer, WeakSet[TRP]]" = WeakKeyDictionary()


class TRP:
    """Trained Rank Pruning (arXiv 1812.02402) around the user's own training loop.

    After every `every`-th optimizer step the rule chooses ranks from the present spectra, and the weights of the layers
    that it gives one are replaced by their truncated SVD; the next iteration then runs on low-rank weights (TRP's low-rank
    iteration). Other layers keep their full capacity. Energy and SingularValue give every layer a rank, as in the paper;
    those whose pairs would not be cheaper in the end stay dense. Parts of a model that want other settings take a TRP each,
    of which no two have the same layers (`include`, `exclude`); once all are finalized, ``decompose(model, a.plan | b.plan)``
    has all parts decomposed.

    Args:
        model: the dense model in training; compile and DataParallel wrappers are looked through.
        scheme: ``"channel"``, ``"spatial"``, ``"decoupled"`` or ``"auto"``.
        rule: decides the ranks at every projection, like ``Energy(keep=0.98)`` or ``Budget(macs=0.4)``.
        every: optimizer steps from one projection to the next, m in the paper.
        nuclear: weight of the nuclear-norm sub-gradient, lambda in the paper, added right before a step to the gradient of
            every layer that may be decomposed. Like weight decay in SGD it comes after clipping and is scaled by the learning
            rate.
        nuclear_cadence: ``"step"`` adds it at every step, from factors refreshed at each projection, so that its strength does
            not depend on `every`; ``"projection"`` adds it only at the step right after a projection, as the authors do.
        ramp: steps over which the rule is annealed from "keep everything" to itself, by a cubic: fast first, slow towards
            the end. 0 applies the rule in full from the start. Rules that can: Budget and Energy.
        freeze: after this many steps the ranks are chosen no more, and projections keep to them; None never freezes.
        example_inputs, include, exclude, round_to: as in make_plan.
        process_group: the processes that train this model together, where torch.distributed is initialised when attach() is
            called; None is all of them. They share out the factorisations and hold equal weights after every projection.

    Attributes:
        schedule: when it projects, and by which rule.
        plan: the plan of the last projection; None before the first.
        steps: optimizer steps taken while attached (steps that a GradScaler skipped are not counted).
        history: for every projection the step it followed and the rank of each layer it decomposed.

    Raises:
        RankPruneError: for values out of range and whatever make_plan raises, but for what concerns latencies: attach() times.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rule: RankRule,
        scheme: str = "auto",
        every: int = 20,
        nuclear: float = 0.0,
        nuclear_cadence: Literal["step", "projection"] = "step",
        ramp: int = 0,
        freeze: int | None = None,
        example_inputs: Inputs | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        round_to: int = 1,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if not nuclear >= 0:
            raise RankPruneError(f"nuclear={nuclear}: give a weight of at least 0, like 3e-4")
        if nuclear_cadence not in ("step", "projection"):
            raise RankPruneError(f"nuclear_cadence={nuclear_cadence!r}: choose 'step' or 'projection'")
        self._planner = Planner(
            model,
            scheme=scheme,
            rule=rule,
            example_inputs=example_inputs,
            include=include,
            exclude=exclude,
            round_to=round_to,
        )
        self.model, self.schedule = self._planner.model, Schedule(rule, every, ramp, freeze)
        self.nuclear, self.nuclear_cadence = nuclear, nuclear_cadence
        self.plan: Plan | None = None
        self.steps = 0
        self.history: list[tuple[int, dict[str, int]]] = []
        self._process_group = process_group
        self._stopwatch, self._outermost = Stopwatch(), Outermost()
        self._projected_at: int | None = None
        self._annealed = True
        self._subgradients: dict[str, Tensor] = {}
        self._starts: dict[Key, Tensor] = {}
        self._handles: list[Any] = []

    # -- the optimizer's hooks ------------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer) -> "TRP":
        """Hook into `optimizer` and return self.

        Where the rule goes by latency, the network is timed now, unless a state with its times was loaded. With several
        processes the first one does that while the others wait, so the time-out of their group must be longer than it takes.

        Raises:
            RankPruneError: if `optimizer` is none, if already attached, if another TRP on this optimizer has some of the same
                layers, if the optimizer does not hold their weights, or if a budget of latency cannot be met.
                Weights that are sharded (FSDP2) cannot be timed: load the state of a TRP attached before sharding.
            MissingExtraError, ExportError: if the backend of such a budget is not installed, or cannot take the model.
        """
        if not isinstance(optimizer, Optimizer):
            raise RankPruneError(
                f"attach() takes a torch.optim.Optimizer, not a {type(optimizer).__name__}; a wrapper holds one, "
                "often as .optimizer"
            )
        if self._handles:
            raise RankPruneError("this TRP is already attached to an optimizer; call detach() first")
        weights = self._planner.weights()
        for other in _ATTACHED.get(optimizer, ()):
            theirs = set(map(id, other._planner.weights().values()))
            if shared := [name for name, weight in weights.items() if id(weight) in theirs]:
                raise RankPruneError(
                    f"another TRP is attached to this optimizer that has {len(shared)} of these layers, too "
                    f"({', '.join(shared[:3])}); call "
                    "detach() on it first, or leave them out with exclude="
                )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, weight in weights.items() if id(weight) not in held]
        if missing:
            raise RankPruneError(
                f"the optimizer does not hold the weights of {len(missing)} of {len(self._planner.layers)} layers "
                f"({', '.join(missing[:3])}); give it model.parameters() of the same model, or leave frozen layers out "
                "with exclude="
            )
        self._planner.join(Team(self._process_group))
        self._stopwatch, self._outermost = Stopwatch(), Outermost()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _ATTACHED.setdefault(optimizer, WeakSet()).add(self)
        return self

    def detach(self) -> None:
        """Take the hooks off. The weights stay as they are; attach() goes on where it stopped."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for attached in list(_ATTACHED.values()):
            attached.discard(self)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._outermost.enter() or overflowed(optimizer):
            return None

        def add() -> None:
            with self._stopwatch.running():
                weights = self._planner.weights()
                terms = {weights[name]: term for name, term in self._subgradients.items()}
                add_to_gradients(optimizer, terms, self.nuclear)

        with self._stopwatch.running():
            due = self.nuclear_cadence == "step" or self._projected_at == self.steps
            if self.nuclear and due and not self._subgradients:  # before the first projection, or of a state without them
                self._subgradients = subgradients(self._planner, self.plan, self._planner.factor())
        if not self.nuclear or not self._subgradients:
            return None
        if has_closure(args, kwargs):
            return after_closure(args, kwargs, add)
        add()
        return None

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._outermost.leave() or overflowed(optimizer):
            return
        self.steps += 1
        if self.nuclear_cadence == "projection":
            self._subgradients = {}
        if self.schedule.projects_after(self.steps):
            with self._stopwatch.running(self._device()):
                self.project()

    # -- projecting -----------------------------------------------------------------------------------------------

    def project(self) -> Plan:
        """Choose ranks and project the weights now, whatever the step; returns the plan, also kept in `plan`.

        Where the rule goes by latency, the first projection at the full rule times the network once more, as it would be
        decomposed now, and chooses by that.

        Raises:
            FactorizationError: naming the layer, if a weight is not finite.

        Warns:
            UserWarning: if a budget of latency cannot be met by those times; ranks are then chosen by the earlier ones.
        """
        return self._project(self.schedule.rule_after(self.steps))

    def _project(self, rule: RankRule) -> Plan:
        planner = self._planner
        frozen = self.schedule.keeps_ranks_after(self.steps) and not self._annealed
        if planner.latency is not None and planner.latency.table is None:
            planner.join(planner.team)  # not attached
        if self.plan is not None and frozen:
            planned = [(name, entry.scheme or "") for name, entry in self.plan.projected.items()]
            factored = planner.factor(self._starts, None if self.nuclear else planned)
        else:
            factored = planner.factor(self._starts)
            if self._annealed and rule is planner.rule:  # the ranks to come are chosen now, at spectra that training has made
                self._correct_latency(factored)
            self.plan = planner.plan(factored, rule)
            self._annealed = rule is not planner.rule
        if self.nuclear:
            self._subgradients = project_with_subgradients(planner, self.plan, factored)
        else:
            self._subgradients = {}
            project_factored(planner, self.plan, factored)
        self._starts = planner.leading(self.plan, factored)
        self._projected_at = self.steps
        self.history.append((self.steps, self.plan.ranks))
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

    def _time(self) -> None:
        if self.plan is None:
            return
        try:
            self.plan = self._planner.timed(self.plan)
        except RankPruneError as error:
            warnings.warn(f"the decomposed network could not be timed: {error}", stacklevel=3)

    def _device(self) -> torch.device:
        return next(iter(self._planner.layers.values())).module.get_parameter("weight").device

    @property
    def overhead(self) -> float:
        """What TRP adds to the training: seconds in its hooks by seconds of everything else, since attach().

        On a GPU that leaves out adding the nuclear terms to the gradients: only projections wait for the device.
        """
        return self._stopwatch.overhead

    def metrics(self) -> dict[str, float]:
        """What to log: the shares of the dense model that the plan leaves, the overhead, and the rank of each layer."""
        found = {"rankprune/overhead": self.overhead}
        if self.plan is not None:
            if self.plan.macs is not None and self.plan.macs_dense:
                found["rankprune/macs"] = self.plan.macs / self.plan.macs_dense
            if self.plan.ms is not None and self.plan.ms_dense:
                found["rankprune/ms"] = self.plan.ms / self.plan.ms_dense
            found["rankprune/params"] = self.plan.params / self.plan.params_dense
            found |= {f"rankprune/rank/{name}": float(rank) for name, rank in self.plan.ranks.items()}
        return found

    def finalize(self, into: nn.Module | None = None) -> nn.Module:
        """Project once more, detach, and return a decomposed copy of the model; `plan` says how.

        If the last step was itself followed by a projection in full, its ranks count. Where the rule goes by latency, the first
        process times the network as it is decomposed, for the plan's `ms_measured`, while the others wait; not if the weights
        are sharded, or the times it goes by are from another machine.

        Args:
            into: a fresh dense model, which takes up the weights and is decomposed in place of `model`. Needed where the
                weights are sharded (FSDP2); every process then gets the whole decomposed model.

        Raises:
            RankPruneError: if the weights are sharded and there is no `into`.

        Warns:
            UserWarning: if the network cannot be timed; the plan then has no measured time.
        """
        reshard(self.model)
        sharded = any(is_sharded(p) for p in self.model.parameters())
        if sharded and into is None:
            raise RankPruneError("the weights are sharded over processes: give finalize(into=...) a fresh dense model to fill")
        if self.plan is None or self._projected_at != self.steps or self._annealed:
            self.plan = self._project(self._planner.rule)
        else:  # at the ranks it has; the weights may have been exchanged since, for those of an average, say
            project_factored(self._planner, self.plan, self._planner.factor())
        self._time()
        self.detach()
        if into is None:
            return decompose(self.model, self.plan)
        dense = unwrap(into)
        dense.load_state_dict({name: self._planner.team.whole(value) for name, value in self.model.state_dict().items()})
        return decompose(dense, self.plan)

    # -- resuming -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the states of the model and the optimizer: plain values and tensors.

        It holds what is whole on this process: with several, any of them may save it, and what is left out is computed anew.
        """
        table = None if self._planner.latency is None else self._planner.latency.table
        alone = self._planner.team.size == 1
        return {
            "steps": self.steps,
            "layers": self._shapes(),
            "scheme": self._planner.scheme,
            "projected_at": self._projected_at,
            "annealed": self._annealed,
            "plan": None if self.plan is None else self.plan.to_json(),
            "history": [(step, dict(ranks)) for step, ranks in self.history],
            "latency": None if table is None else asdict(table),
            "subgradients": {
                name: self._planner.team.whole(term).clone()
                for name, term in self._subgradients.items()
                if alone or not is_sharded(term)
            },
            "starts": self._starts if alone else {},
        }

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(layer.module.get_parameter("weight").shape) for name, layer in self._planner.layers.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """The choices it was made with, as plain values."""
        planner, schedule = self._planner, self.schedule
        return {
            "rule": repr(schedule.rule),
            "scheme": planner.scheme,
            "round_to": planner.round_to,
            "every": schedule.every,
            "ramp": schedule.ramp,
            "freeze": schedule.freeze,
            "nuclear": self.nuclear,
            "nuclear_cadence": self.nuclear_cadence,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from state_dict(), bit for bit; the model's and the optimizer's states are loaded before.

        Load it before attach() where the rule goes by latency: then nothing is timed again.

        Raises:
            RankPruneError: if the state is of another model, or holds latencies of another backend, dtype or number of threads.
        """
        here, there = self._shapes(), state.get("layers", {})
        if state.get("scheme", self._planner.scheme) != self._planner.scheme:
            raise RankPruneError(f"this state is of scheme {state['scheme']!r}, not {self._planner.scheme!r}")
        differing = [name for name in {**here, **there} if list(here.get(name, ())) != list(there.get(name, ()))]
        if differing:
            raise RankPruneError(
                f"this state is of another model, or of other include and exclude patterns: it differs in {differing[:3]}"
            )
        if self._planner.latency is not None and state.get("latency"):  # what was measured before decides on
            self._planner.latency.load(state["latency"])
        self.steps = state["steps"]
        self._projected_at, self._annealed = state["projected_at"], state["annealed"]
        self.plan = None if state["plan"] is None else Plan.from_json(state["plan"])
        self.history = [(step, dict(ranks)) for step, ranks in state["history"]]
        weights = self._planner.weights()
        self._subgradients = {
            name: sharded_like(term.to(weights[name].device, copy=True), weights[name])
            for name, term in state["subgradients"].items()
        }
        self._starts = {(name, scheme): start.to(weights[name].device) for (name, scheme), start in state["starts"].items()}
