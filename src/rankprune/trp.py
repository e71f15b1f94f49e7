"""Trained Rank Pruning: hooks around an optimizer's step that keep a network on the way to low rank. No mathematics in here."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from rankprune.decompose import decompose
from rankprune.distributed import Team, is_sharded, reshard
from rankprune.errors import RankPruneError
from rankprune.inputs import Inputs
from rankprune.iteration import STATE, LowRankIteration
from rankprune.optimizer_step import (
    Outermost,
    add_to_gradients,
    after_closure,
    eager,
    has_closure,
    is_rehearsal,
    overflowed,
    refuse_capture,
    refuse_without,
    refuse_without_hooks,
)
from rankprune.plan import Plan
from rankprune.planner import Planner
from rankprune.rules import RankRule
from rankprune.schedule import Schedule
from rankprune.stopwatch import Stopwatch
from rankprune.wrappers import unwrap

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
        scheme: ``"channel"``, ``"spatial"``, ``"decoupled"`` or ``"auto"`` (per layer, whichever serves the rule best).
        rule: decides the ranks at every projection, like ``Energy(keep=0.98)`` or ``Budget(macs=0.4)``.
        every: optimizer steps from one projection to the next, m in the paper.
        nuclear: weight of the nuclear-norm sub-gradient, lambda in the paper, added right before a step to the gradient of
            every layer of which a pair can come; once ranks are kept, of those that have one. Like weight decay in SGD it
            comes after clipping and is scaled by the learning rate.
        nuclear_cadence: ``"step"`` adds it at every step, from factors refreshed at each projection, so that its strength does
            not depend on `every`; ``"projection"`` adds it only at the step right after a projection, as the authors do.
        ramp: steps over which the rule is annealed from "keep everything" to itself, by a cubic: fast first, slow towards
            the end; half of the training suits a budget. 0, the paper's way, applies the rule in full from the start. Rules
            that can: those with `relaxed`, like Budget and Energy. Once the rule has applied in full it is annealed no more.
        freeze: after this many steps, no fewer than `ramp`, the ranks are chosen no more, and projections keep to them; None
            never freezes.
        example_inputs, include, exclude, round_to: as in make_plan.
        process_group: the processes that train this model together, where torch.distributed is initialised when attach() is
            called; None is all of them. They share out the factorisations and hold equal weights after every projection.

    Attributes:
        steps: optimizer steps taken while attached. Those that a GradScaler skipped are not counted, nor are those without
            gradients by which torch.distributed.checkpoint makes an optimizer's state.

    Raises:
        RankPruneError: for values out of range and whatever make_plan raises, but for what concerns latencies: attach() times.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rule: RankRule,
        scheme: str = "spatial",
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
        if not 0 <= nuclear < math.inf:
            raise RankPruneError(f"nuclear={nuclear}: give a finite weight of at least 0, like 3e-4")
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
        self._factorizer = self._planner.factorizer
        self.model, self._nuclear, self._cadence = self._planner.model, nuclear, nuclear_cadence
        self._iteration = LowRankIteration(self._planner, Schedule(rule, every, ramp, freeze), nuclear > 0)
        self.steps = 0
        self._process_group = process_group
        self._stopwatch, self._outermost, self._counts = Stopwatch(), Outermost(), True
        self._handles: list[Any] = []

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"TRP({said}; {self.steps} steps, {'attached' if self.attached else 'not attached'})"

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which is not attached: hooks stay with the optimizer that they were registered on."""
        return self.__dict__ | {"_handles": [], "_outermost": Outermost()}

    @property
    def schedule(self) -> Schedule:
        """When it projects, and by which rule."""
        return self._iteration.schedule

    @property
    def plan(self) -> Plan | None:
        """The plan of the last projection; None before the first."""
        return self._iteration.plan

    @property
    def history(self) -> list[tuple[int, dict[str, int]]]:
        """For every projection the step it followed and the rank of each layer it decomposed."""
        return self._iteration.history

    # -- the optimizer's hooks ------------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer) -> "TRP":
        """Hook into `optimizer` and return self.

        Where the rule goes by latency, the network is timed now, unless a state with its times was loaded. With several
        processes the first one does that while the others wait, so the time-out of their group must be longer than it takes.

        Raises:
            RankPruneError: if `optimizer` is none, or a wrapper whose step runs no hooks, if already attached, if another TRP
                on this optimizer has some of the same layers, if the optimizer does not hold their weights, if processes that
                train together differ in model, settings or state, or if a budget of latency cannot be met.
                Weights that are sharded (FSDP2) cannot be timed: load the state of a TRP attached before sharding.
            MissingExtraError, ExportError: if the backend of such a budget is not installed, or cannot take the model.
        """
        refuse_without_hooks(optimizer)
        if self.attached:
            raise RankPruneError("this TRP is already attached to an optimizer; call detach() first")
        weights = self._factorizer.weights()
        for other in _ATTACHED.get(optimizer, ()):
            theirs = set(map(id, other._factorizer.weights().values()))
            if shared := [name for name, weight in weights.items() if id(weight) in theirs]:
                raise RankPruneError(
                    f"another TRP is attached to this optimizer that has {len(shared)} of these layers, too "
                    f"({', '.join(shared[:3])}); call detach() on it first, or leave them out with exclude="
                )
        refuse_without(weights, optimizer)
        team = Team(self._process_group)
        team.agree({**self._iteration.standing, "nuclear terms": (self._nuclear, self._cadence), "steps": self.steps})
        self._planner.join(team)
        self._stopwatch, self._outermost = Stopwatch(), Outermost()
        self._handles = [
            optimizer.register_step_pre_hook(eager(self._before_step)),
            optimizer.register_step_post_hook(eager(self._after_step)),
        ]
        _ATTACHED.setdefault(optimizer, WeakSet()).add(self)
        return self

    @property
    def attached(self) -> bool:
        """Whether it is hooked into an optimizer."""
        return bool(self._handles)

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
        if not self._outermost.enter():
            return None
        refuse_capture()
        self._counts = not overflowed(optimizer) and (has_closure(args, kwargs) or not is_rehearsal(optimizer))
        if not self._counts:
            return None

        def add() -> None:
            with self._stopwatch.running():
                weights = self._factorizer.weights()
                terms = {weights[name]: term for name, term in (self._iteration.subgradients or {}).items()}
                add_to_gradients(optimizer, terms, self._nuclear)

        with self._stopwatch.running():
            due = self._cadence == "step" or self._iteration.projected_at == self.steps
            if self._nuclear and due and self._iteration.subgradients is None:
                self._iteration.find_subgradients()
        if not self._nuclear or not self._iteration.subgradients:
            return None
        if has_closure(args, kwargs):
            return after_closure(args, kwargs, eager(add))
        add()
        return None

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._outermost.leave() or not self._counts:
            return
        self.steps += 1
        if self._cadence == "projection":
            self._iteration.subgradients = None
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
        return self._iteration.project(self.steps)

    def _device(self) -> torch.device:
        return next(iter(self._factorizer.layers.values())).module.get_parameter("weight").device

    @property
    def overhead(self) -> float:
        """What TRP adds to the training: seconds in its hooks divided by seconds of everything else, since attach().

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

        The projection is of `model` itself, which stays dense and computes what the copy does. That ends this TRP's part in
        the training; in between, ``decompose(model, trp.plan)`` is the network as it would be now, where no weight is sharded.
        If the last step was itself followed by a projection in full, its ranks count. Where the rule goes by latency, the first
        process times the network as it is decomposed, for the plan's `ms_measured`, while the others wait; not if the weights
        are sharded, or the times it goes by are from another machine.

        Args:
            into: a fresh dense model, which takes up the weights and is decomposed in place of `model`. Needed where the
                weights are sharded (FSDP2); every process then gets the whole decomposed model.

        Raises:
            RankPruneError: if the weights are sharded and there is no `into`, or `into` is of another architecture.

        Warns:
            UserWarning: if this projection truncates more than the network was trained for, since none of the training was by
                the rule in full (the ramp is not over, say), or the weights were trained on without this TRP. And if the
                network cannot be timed: the plan then has no measured time.
        """
        reshard(self.model)
        sharded = any(is_sharded(p) for p in self.model.parameters())
        if sharded and into is None:
            raise RankPruneError("the weights are sharded over processes: give finalize(into=...) a fresh dense model to fill")
        if self._factorizer.team.parted:  # as by Accelerate's end_training()
            if sharded:
                raise RankPruneError("the processes that hold the shards have parted: finalize() before the group is destroyed")
            self._factorizer.share_out(Team.alone())
        if why := self._iteration.unsettled(self.steps):
            warnings.warn(
                f"{why}: finalize() truncates more than the network was trained for. Ramps and every= count optimizer steps, "
                "of which there are fewer than batches where gradients are accumulated; a best checkpoint should be one from "
                "after the ramp",
                stacklevel=2,
            )
        plan = self._iteration.finish(self.steps)
        self.detach()
        if into is None:
            return decompose(self.model, plan)
        dense = unwrap(into)
        self._factorizer.team.fill(dense, self.model)
        return decompose(dense, plan)

    # -- resuming -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the states of the model and the optimizer: plain values and tensors.

        It holds what is whole on this process: with several, any of them may save it, and what is left out is computed anew.
        """
        return {"steps": self.steps, **self._iteration.state_dict()}

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
            "nuclear": self._nuclear,
            "nuclear_cadence": self._cadence,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from state_dict(), bit for bit; the model's and the optimizer's states are loaded before.

        Load it before attach() where the rule goes by latency: then nothing is timed again.

        Raises:
            RankPruneError: if it is no state of a TRP, or one of another model, or holds latencies of another backend, dtype
                or number of threads.
        """
        if not isinstance(state, dict) or {"steps", *STATE} - state.keys():
            raise RankPruneError("this is no state of a TRP; give what state_dict() returned")
        self._iteration.load_state_dict(state)
        self.steps = state["steps"]
