"""From a model to a Plan: select layers, see them as matrices, factor, and let the rule choose."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankprune import linalg
from rankprune.backends import backend_named
from rankprune.budget import Budget
from rankprune.calibration import whitenings
from rankprune.cost import Inputs, LayerCost, count, pair_macs, parameter_count
from rankprune.distributed import Team
from rankprune.errors import RankPruneError
from rankprune.latency import LatencyTable, Subject, correct_table, measure_table, ranks_to_try
from rankprune.layers import Layer, own_weight, select, unwrap
from rankprune.linalg import Basis
from rankprune.plan import LayerPlan, Plan
from rankprune.ranks import Candidate, Choice, Cost, RankRule
from rankprune.schemes import Scheme, schemes_for
from rankprune.spectrum import Spectrum


@dataclass(frozen=True)
class Option:
    """A layer under one scheme, with the cost of one rank. What does not change while the weights train."""

    layer: Layer
    scheme: Scheme[Any]
    unit: Cost
    dense: Cost
    full_rank: int
    input_shapes: tuple[tuple[int, ...], ...] = ()


Key = tuple[str, str]
"""A layer's name and a scheme's."""


@dataclass
class Factored:
    """The weights of a moment, factored: everything known so far, by layer and scheme.

    `spectra` are those of all layers; `stacks` and `bases` those of the layers that this process owns.
    """

    spectra: dict[Key, Spectrum] = field(default_factory=dict)
    stacks: dict[Key, Tensor] = field(default_factory=dict)
    bases: dict[Key, Basis] = field(default_factory=dict)


class Planner:
    """Surveys a model once; then plans from its weights as often as asked.

    Args:
        model: compile and DataParallel wrappers are looked through.
        scheme: ``"channel"``, ``"spatial"``, ``"decoupled"`` or ``"auto"`` (per layer, whichever serves the rule best).
        rule: decides the ranks.
        example_inputs: what the model is called with, a tensor, tuple or dict. Needed by rules that count MACs; where
            given, "cheaper" is judged in MACs, otherwise in parameters.
        include, exclude: shell patterns on module names, see rankprune.layers.select.
        round_to: ranks are rounded up to a multiple of this.
        calibration: inputs like example_inputs, some hundred images or sequences. Given, errors are measured in the
            layers' outputs on them instead of in their weights; decompose with the same inputs.

    Raises:
        RankPruneError: for an unknown scheme, a pattern that matches nothing, a model without a layer to decompose, or a
            rule that counts MACs without example inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scheme: str,
        rule: RankRule,
        example_inputs: Inputs | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        round_to: int = 1,
        calibration: Iterable[Inputs] | None = None,
    ) -> None:
        if not isinstance(round_to, int) or round_to < 1:
            raise RankPruneError(f"round_to={round_to}: give a whole number of at least 1")
        if not isinstance(rule, RankRule):
            raise RankPruneError(f"rule={rule!r} is not a rank rule; use one like Energy(keep=0.98) or Budget(macs=0.5)")
        if rule.metric in ("macs", "latency") and example_inputs is None:
            what = "counts MACs" if rule.metric == "macs" else "needs times"
            raise RankPruneError(f"{rule!r} {what}: give example inputs, one batch as the model is called with")
        self.model = unwrap(model)
        self.scheme, self.rule, self.round_to = scheme, rule, round_to
        counted = None if example_inputs is None else count(self.model, example_inputs)
        costs = {row.name: row for row in counted.layers} if counted else {}
        calls = {name: row.obstacle for name, row in costs.items() if row.calls} if counted else None
        selection = select(self.model, include, exclude, calls)
        self._uncounted = counted.uncounted if counted else ()
        self._cost = Cost(counted.macs if counted else None, parameter_count(self.model))
        self._static: dict[str, LayerPlan] = {}
        self.options: dict[str, list[Option]] = {}
        for layer in selection.layers:
            schemes, reason = schemes_for(scheme, layer.module)
            row = costs.get(layer.name)
            if schemes:
                self.options[layer.name] = [_option(layer, s, row) for s in schemes]
            self._static[layer.name] = _entry(layer.name, layer.module, row, reason)
        for skip in selection.skipped:
            self._static[skip.name] = _entry(skip.name, skip.module, costs.get(skip.name), skip.reason)
        if not self.options:
            why = "; ".join(f"{e.name}: {e.reason}" for e in list(self._static.values())[:4])
            raise RankPruneError(f"scheme {scheme!r} can express none of the layers ({why}); try scheme='auto'")
        self.latency: LatencyTable | None = None
        if rule.metric == "latency":
            if not isinstance(rule, Budget) or example_inputs is None:
                raise RankPruneError(f"{rule!r} goes by latency but names no backend; derive the rule from Budget")
            tries = backend_named(rule.backend).ranks
            self._subjects = {name: _subject(options, tries, round_to) for name, options in self.options.items()}
            self._example_inputs = example_inputs
            self.latency = measure_table(self.model, example_inputs, self._subjects, rule.backend, rule.threads)
        flat = self._flat()
        flat_spectra = {key: Spectrum.of(torch.ones(1, o.full_rank, device="cpu")) for key, o in flat.items()}
        self._choose(flat_spectra, rule)  # raises if the rule cannot be met, whatever the spectra
        self.correct_latency(flat_spectra)
        self._choose(flat_spectra, rule)  # also with the corrected times
        self.join(Team.alone())
        layers = {key: (o.layer.module, o.scheme) for key, o in flat.items()}
        self._whitenings = {} if calibration is None else whitenings(self.model, layers, calibration)

    def join(self, team: Team) -> None:
        """From now on share the factorisations with the other processes of a team; all must then call the same methods."""
        self.team = team
        if self.latency is not None:  # each process measured, and their tables differ
            table = self.latency
            self.latency = team.share(lambda: {"latency": table} if team.rank == 0 else {})["latency"]
        self.owner = team.owners({name: sum(map(_effort, options)) for name, options in self.options.items()})

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers under consideration, by name."""
        return {name: options[0].layer for name, options in self.options.items()}

    @torch.no_grad()
    def factor(self, starts: Mapping[Key, Tensor] | None = None, keys: Iterable[Key] | None = None) -> Factored:
        """Factor the present weights, every layer under every scheme it may get, or those in `keys`.

        Args:
            starts: leading vectors known from a little earlier, as linalg.bases takes them; other layers get their whole basis.
        """
        factored = Factored()
        self._factor_into(factored, self._flat() if keys is None else keys, starts)
        return factored

    def _factor_into(self, factored: Factored, keys: Iterable[Key], starts: Mapping[Key, Tensor] | None = None) -> None:
        wanted = set(keys)
        stacks: dict[Key, Tensor] = {}
        for name, options in self.options.items():
            schemes = [o.scheme for o in options if (name, o.scheme.name) in wanted]
            if schemes:
                module = options[0].layer.module
                whole = self.team.whole(module.get_parameter("weight"))  # all take part, owner or not
                if self.owner[name] == self.team.rank:
                    stacks |= {(name, scheme.name): scheme.to_matrices(module, whole) for scheme in schemes}
        stacks |= {key: white.apply(stacks[key]) for key, white in self._whitenings.items() if key in stacks}

        def spectra() -> dict[Key, Spectrum]:
            found = linalg.bases_by_layer(stacks, starts)
            factored.bases |= found
            return {key: basis.spectrum.cpu() for key, basis in found.items()}

        factored.stacks |= stacks
        factored.spectra |= self.team.share(spectra)

    def _flat(self) -> dict[Key, Option]:
        return {(o.layer.name, o.scheme.name): o for options in self.options.values() for o in options}

    def plan(self, factored: Factored, rule: RankRule | None = None) -> Plan:
        """Let the rule (or another one in its place) choose for the present weights.

        Where it asks for more than is known of a layer, the whole layer is factored, into `factored`, and the rule asked again.
        """
        while True:
            candidates, choices = self._choose(factored.spectra, rule or self.rule)
            chosen = {(name, c.scheme): c.rank for name, c in choices.items() if c.scheme and c.rank}
            short = [key for key, rank in chosen.items() if rank > factored.spectra[key].known]
            if not short:
                break
            self._factor_into(factored, short)
        decided = {name: self._decide(name, candidates[name], choice) for name, choice in choices.items()}
        order = [name for name, _ in self.model.named_modules() if name in self._static]
        entries = tuple(decided.get(name, self._static[name]) for name in order)
        ms = None if self.latency is None else self.latency.network_ns / 1e6
        return Plan(entries, self._cost.macs, self._cost.params, self.scheme, repr(self.rule), self._uncounted, ms)

    def _choose(self, spectra: Mapping[Key, Spectrum], rule: RankRule) -> tuple[dict[str, list[Candidate]], dict[str, Choice]]:
        """The candidates of every layer, and what the rule says of them."""
        candidates = {name: [self._candidate(o, spectra) for o in options] for name, options in self.options.items()}
        network = self._cost if self.latency is None else replace(self._cost, ns=self.latency.network_ns)
        return candidates, rule.choose(candidates, network)

    def _candidate(self, option: Option, spectra: Mapping[Key, Spectrum]) -> Candidate:
        name, scheme, dense, pair_ns = option.layer.name, option.scheme.name, option.dense, None
        if self.latency is not None:
            times = self.latency.layers[name]
            dense, pair_ns = replace(dense, ns=times.dense_ns), times.pair_ns.get(scheme, {})
        return Candidate(scheme, spectra[name, scheme], option.unit, dense, self.round_to, pair_ns)

    def correct_latency(self, spectra: Mapping[Key, Spectrum]) -> None:
        """Time the network as the rule would decompose it at these spectra, and set the table right by that."""
        if self.latency is not None:
            _, choices = self._choose(spectra, self.rule)
            variant = {name: (c.scheme, c.rank) for name, c in choices.items() if c.scheme and c.rank}
            self.latency = correct_table(self.latency, self.model, self._example_inputs, self._subjects, variant)

    def leading(self, plan: Plan, factored: Factored) -> dict[Key, Tensor]:
        """The leading vectors to start from next time: as many as the plan keeps, or cost the same under another scheme."""
        starts = {}
        for name, entry in plan.decomposed.items():
            chosen = next(o for o in self.options[name] if o.scheme.name == entry.scheme)
            metric = "params" if chosen.unit.macs is None else "macs"
            for o in self.options[name]:
                basis = factored.bases.get((name, o.scheme.name))
                rank = -(-(entry.rank or 1) * chosen.unit.of(metric) // max(o.unit.of(metric), 1))
                if basis is not None and linalg.worth_starting(o.full_rank, rank):
                    starts[name, o.scheme.name] = basis.vectors[..., :rank].float().clone()
        return starts

    def _decide(self, name: str, candidates: Sequence[Candidate], choice: Choice) -> LayerPlan:
        static = self._static[name]
        if choice.scheme is None or choice.rank is None:
            return replace(static, reason=choice.reason)
        chosen = next(c for c in candidates if c.scheme == choice.scheme)
        macs = None if chosen.unit.macs is None else choice.rank * chosen.unit.macs
        return replace(
            static,
            scheme=choice.scheme,
            rank=choice.rank,
            full_rank=chosen.full_rank,
            macs_after=macs,
            params_after=static.params_before - chosen.dense.params + choice.rank * chosen.unit.params,
            error=float(chosen.spectrum.errors()[choice.rank]),
            ms_before=None if chosen.dense.ns is None else chosen.dense.ns / 1e6,
            ms_after=None if chosen.pair_ns is None else chosen.pair_ns[choice.rank] / 1e6,
        )


def make_plan(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    scheme: str = "auto",
    rule: RankRule,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    round_to: int = 1,
    calibration: Iterable[Inputs] | None = None,
) -> Plan:
    """Decide, from the weights as they are, which layers to decompose and at which rank. The model is left as it was.

    Arguments and errors are those of Planner.

    >>> from rankprune.ranks import RankFraction
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    >>> make_plan(model, rule=RankFraction(0.25)).ranks
    {'0': 16}
    """
    planner = Planner(
        model,
        scheme=scheme,
        rule=rule,
        example_inputs=example_inputs,
        include=include,
        exclude=exclude,
        round_to=round_to,
        calibration=calibration,
    )
    factored = planner.factor()
    planner.correct_latency(factored.spectra)
    return planner.plan(factored)


def _effort(option: Option) -> float:
    """About how long the factorisation takes, in arbitrary units."""
    weight = option.layer.module.get_parameter("weight")
    return weight.numel() * option.full_rank


def _option(layer: Layer, scheme: Scheme[Any], row: LayerCost | None) -> Option:
    pair = scheme.empty_pair(layer.module, 1).to("meta")
    unit = Cost(pair_macs(pair, row.input_shapes) if row else None, sum(half.get_parameter("weight").numel() for half in pair))
    weight = layer.module.get_parameter("weight")
    matrices = scheme.to_matrices(layer.module, torch.empty_like(weight, device="meta"))
    dense = Cost(row.macs if row else None, weight.numel())
    return Option(layer, scheme, unit, dense, min(matrices.shape[1:]), row.input_shapes if row else ())


def _subject(options: Sequence[Option], count: int, round_to: int) -> Subject:
    """A layer to be timed, at about `count` ranks of each scheme that save MACs."""
    ranks = {}
    for o in options:
        affordable = (o.dense.of("macs") - 1) // max(o.unit.of("macs"), 1)
        ranks[o.scheme] = ranks_to_try(min(o.full_rank, affordable), count, round_to)
    return Subject(options[0].layer.module, options[0].input_shapes, ranks)


def _entry(name: str, module: nn.Module, row: LayerCost | None, reason: str | None) -> LayerPlan:
    """The plan's entry of a module that stays as it is."""
    weight = own_weight(module)
    params = parameter_count(module, recurse=False)
    macs = row.macs if row else None
    return LayerPlan(
        name=name,
        kind=type(module).__name__,
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
