"""From a model to a Plan: factor its layers as matrices, and let the rule choose."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from rankprune import linalg
from rankprune.backends import backend_named
from rankprune.budget import Budget
from rankprune.calibration import whitened, whitenings
from rankprune.cost import Inputs
from rankprune.distributed import Team, reshard
from rankprune.errors import RankPruneError
from rankprune.latency import LatencyTable, NetworkLatency, Variant
from rankprune.layers import Layer, unwrap
from rankprune.linalg import Basis
from rankprune.plan import LayerPlan, Plan
from rankprune.ranks import Candidate, Choice, RankRule
from rankprune.spectrum import Spectrum
from rankprune.survey import Key, Option, subject, survey

_TRIALS = 3
"""How often at most times are set right by a network as it would be decomposed."""


@dataclass
class Factored:
    """The weights of a moment, factored: everything known so far, by layer and scheme.

    `spectra` are those of all layers; `stacks` and `bases` those of the layers that this process owns.
    """

    spectra: dict[Key, Spectrum] = field(default_factory=dict)
    stacks: dict[Key, Tensor] = field(default_factory=dict)
    bases: dict[Key, Basis] = field(default_factory=dict)


class Planner:
    """Surveys a model once, times it in `join` where the rule goes by latency, and plans from its weights as often as asked.

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
        RankPruneError: for an unknown scheme, a pattern that matches nothing, a model without a layer to decompose, a rule that
            needs example inputs and has none, or a budget of MACs or parameters that cannot be met.
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
        self.survey = survey(self.model, scheme, example_inputs, include, exclude)
        self.options = self.survey.options
        self._flat = {o.key: o for options in self.options.values() for o in options}
        self.latency: NetworkLatency | None = None
        if rule.metric == "latency":
            if not isinstance(rule, Budget) or example_inputs is None:
                raise RankPruneError(f"{rule!r} goes by latency but names no backend; derive the rule from Budget")
            tries = backend_named(rule.backend).ranks
            subjects = {name: subject(options, tries, round_to) for name, options in self.options.items()}
            self.latency = NetworkLatency(self.model, example_inputs, subjects, rule.backend, rule.threads)
        else:
            self._choose_flat()
        self._share_out(Team.alone())
        layers = {key: (o.layer.module, o.scheme) for key, o in self._flat.items()}
        self._whitenings = {} if calibration is None else whitenings(self.model, layers, calibration)

    def join(self, team: Team) -> None:
        """From now on share the factorisations with the other processes of a team; all must then call the same methods.

        Where the rule goes by latency, the network is timed now, unless its times were loaded: by the first process, while the
        others wait for it. That can take minutes, so the team's time-out must be longer than that.

        Raises:
            RankPruneError: if latency cannot be measured here, or the budget in it cannot be met.
        """
        self._share_out(team)
        if self.latency is not None:
            self.latency.measure(team, self._choose_flat)
            self._choose_flat()  # also with the times that were loaded, or corrected

    def _share_out(self, team: Team) -> None:
        self.team = team
        self.owner = team.owners({name: sum(map(_effort, options)) for name, options in self.options.items()})

    def _choose_flat(self, table: LatencyTable | None = None) -> Variant:
        """What the rule chooses where all singular values are equal. Raises if it cannot be met, whatever the spectra."""
        spectra = {key: Spectrum.of(torch.ones(1, o.full_rank, device="cpu")) for key, o in self._flat.items()}
        return _variant(self._choose(spectra, self.rule, table)[1])

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers under consideration, by name."""
        return {name: options[0].layer for name, options in self.options.items()}

    def weights(self) -> dict[str, nn.Parameter]:
        """The weights of the layers under consideration, by name; under FSDP2 the shards, also right after an evaluation."""
        reshard(self.model)
        return {name: layer.module.get_parameter("weight") for name, layer in self.layers.items()}

    @torch.no_grad()
    def factor(
        self, starts: Mapping[Key, Tensor] | None = None, keys: Iterable[Key] | None = None, *, spectra_only: bool = False
    ) -> Factored:
        """Factor the present weights, every layer under every scheme it may get, or those in `keys`.

        Args:
            starts: leading vectors known from a little earlier, as linalg.bases takes them; other layers get their whole basis.
            spectra_only: keep no stacks and bases, which take more space than the model, for planning without projecting.
        """
        factored = Factored()
        self._factor_into(factored, self._flat if keys is None else keys, starts, spectra_only)
        return factored

    def complete(self, factored: Factored, names: Iterable[str]) -> None:
        """Factor some layers whole, under their first scheme, of which only leading vectors are known so far."""
        spectra = {key: factored.spectra[key] for key in (self.options[name][0].key for name in names)}
        if short := [key for key, spectrum in spectra.items() if spectrum.known < spectrum.full_rank]:
            self._factor_into(factored, short)

    def _factor_into(
        self,
        factored: Factored,
        keys: Iterable[Key],
        starts: Mapping[Key, Tensor] | None = None,
        spectra_only: bool = False,
    ) -> None:
        wanted = set(keys)
        weights = self.weights()
        schemes = {name: [o.scheme for o in options if o.key in wanted] for name, options in self.options.items()}
        own: dict[str, Tensor] = {}
        for name in filter(schemes.get, schemes):
            whole = self.team.whole(weights[name])  # all take part, owner or not
            if self.owner[name] == self.team.rank:
                own[name] = whole

        def spectra() -> dict[Key, Spectrum]:
            found = {}
            for names in linalg.in_parts({name: whole.numel() for name, whole in own.items()}) if spectra_only else [own]:
                stacks = {
                    (name, scheme.name): scheme.to_matrices(self.options[name][0].layer.module, own[name])
                    for name in names
                    for scheme in schemes[name]
                }
                stacks = whitened(stacks, self._whitenings)
                bases = linalg.bases_by_layer(stacks, starts)
                found |= {key: basis.spectrum.cpu() for key, basis in bases.items()}
                if not spectra_only:
                    factored.stacks |= stacks
                    factored.bases |= bases
            return found

        factored.spectra |= self.team.share(spectra)

    def plan(self, factored: Factored, rule: RankRule | None = None) -> Plan:
        """Let the rule (or another one in its place) choose for the present weights.

        Where it asks for more than is known of a layer, the whole layer is factored, into `factored`, and the rule asked again.
        """
        candidates, choices = self._settle(factored, rule or self.rule)
        decided = {name: self._decide(name, candidates[name], choice) for name, choice in choices.items()}
        entries = tuple(decided.get(name, entry) for name, entry in self.survey.dense.items())
        whole, table = self.survey.cost, None if self.latency is None else self.latency.known
        return Plan(
            layers=entries,
            macs_dense=whole.macs,
            params_dense=whole.params,
            scheme=self.scheme,
            rule=repr(self.rule),
            uncounted=self.survey.uncounted,
            ms_dense=None if table is None else _in_ms(table.network_ns),
            ms_measured=None if table is None else _in_ms(table.measured_ns(_variant(choices))),
            setting=None if table is None else table.setting,
            input_shapes=() if table is None else table.input_shapes,
        )

    def correct_latency(self, factored: Factored) -> None:
        """Where the rule goes by latency, time the network as it would be decomposed now, and set its times right by that.

        The rule may then choose otherwise: so again, until what it chooses has been timed, or a few times where noise lets it
        not settle.

        Raises:
            RankPruneError: if the budget cannot be met by the times set right.
        """
        if self.latency is None:
            return
        for _ in range(_TRIALS):
            variant = _variant(self._settle(factored, self.rule)[1])
            if self.latency.known.measured_ns(variant) is not None or not self.latency.correct(self.team, variant):
                break

    def timed(self, plan: Plan) -> Plan:
        """The plan with the time that the network decomposed like this takes, where its rule goes by latency."""
        if self.latency is None or self.latency.table is None:
            return plan
        variant = {name: (entry.scheme or "", entry.rank or 1) for name, entry in plan.decomposed.items()}
        if self.latency.known.measured_ns(variant) is None:
            self.latency.correct(self.team, variant, fit=False)
        return replace(plan, ms_measured=_in_ms(self.latency.known.measured_ns(variant)))

    def _settle(self, factored: Factored, rule: RankRule) -> tuple[dict[str, list[Candidate]], dict[str, Choice]]:
        """_choose, with as much factored as the choice needs."""
        while True:
            candidates, choices = self._choose(factored.spectra, rule)
            chosen = {(name, c.scheme): c.rank for name, c in choices.items() if c.scheme and c.rank}
            short = [key for key, rank in chosen.items() if rank > factored.spectra[key].known]
            if not short:
                return candidates, choices
            self._factor_into(factored, short)

    def _choose(
        self, spectra: Mapping[Key, Spectrum], rule: RankRule, table: LatencyTable | None = None
    ) -> tuple[dict[str, list[Candidate]], dict[str, Choice]]:
        """The candidates of every layer, and what the rule says of them, at these times or those that are known."""
        if table is None and self.latency is not None:
            table = self.latency.known
        candidates = {
            name: [_candidate(o, spectra[o.key], self.round_to, table) for o in options]
            for name, options in self.options.items()
        }
        network = self.survey.cost if table is None else replace(self.survey.cost, ns=table.network_ns)
        return candidates, rule.choose(candidates, network)

    def leading(self, plan: Plan, factored: Factored) -> dict[Key, Tensor]:
        """The leading vectors to start from next time: as many as the plan keeps, or cost the same under another scheme."""
        starts = {}
        for name, entry in plan.projected.items():
            chosen = next(o for o in self.options[name] if o.scheme.name == entry.scheme)
            metric = "params" if chosen.unit.macs is None else "macs"
            for o in self.options[name]:
                basis, stack = factored.bases.get(o.key), factored.stacks.get(o.key)
                rank = -(-(entry.rank or 1) * chosen.unit.of(metric) // max(o.unit.of(metric), 1))
                if basis is not None and stack is not None and linalg.worth_starting(stack, rank):
                    starts[name, o.scheme.name] = basis.vectors[..., :rank].float().clone()
        return starts

    def _decide(self, name: str, candidates: Sequence[Candidate], choice: Choice) -> LayerPlan:
        static = self.survey.dense[name]
        if choice.scheme is None or choice.rank is None:
            return replace(static, reason=choice.reason)
        chosen = next(c for c in candidates if c.scheme == choice.scheme)
        error = float(chosen.spectrum.errors()[choice.rank])
        ranked = replace(static, scheme=choice.scheme, rank=choice.rank, full_rank=chosen.full_rank, error=error)
        if choice.reason is not None:
            return replace(ranked, reason=choice.reason)
        return replace(
            ranked,
            macs_after=None if chosen.unit.macs is None else choice.rank * chosen.unit.macs,
            params_after=static.params_before - chosen.dense.params + choice.rank * chosen.unit.params,
            ms_before=_in_ms(chosen.dense.ns),
            ms_after=None if chosen.pair_ns is None else _in_ms(chosen.pair_ns[choice.rank]),
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

    Arguments and errors are those of Planner and its join().

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
    planner.join(Team.alone())
    factored = planner.factor(spectra_only=True)
    planner.correct_latency(factored)
    return planner.timed(planner.plan(factored))


def _effort(option: Option) -> float:
    """About how long the factorisation takes, in arbitrary units."""
    weight = option.layer.module.get_parameter("weight")
    return weight.numel() * option.full_rank


def _candidate(option: Option, spectrum: Spectrum, round_to: int, table: LatencyTable | None) -> Candidate:
    dense, pair_ns = option.dense, None
    if table is not None:
        times = table.layers[option.layer.name]
        dense, pair_ns = replace(dense, ns=times.dense_ns), times.pair_ns.get(option.scheme.name, {})
    return Candidate(option.scheme.name, spectrum, option.unit, dense, round_to, pair_ns)


def _in_ms(ns: int | None) -> float | None:
    return None if ns is None else ns / 1e6


def _variant(choices: Mapping[str, Choice]) -> Variant:
    return {name: (c.scheme, c.rank) for name, c in choices.items() if c.scheme and c.rank and c.reason is None}
