"""From a model to a Plan: let the rule choose by the spectra of its layers and by what they cost."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from rankprune.backends import backend_named
from rankprune.distributed import Team
from rankprune.errors import RankPruneError
from rankprune.factorizer import Factored, Factorizer
from rankprune.inputs import Inputs
from rankprune.latency import LatencyTable, LayerTimes, NetworkLatency, Variant
from rankprune.plan import LayerPlan, Plan
from rankprune.rules import Candidate, Choice, RankRule, check_rule
from rankprune.schemes import Key
from rankprune.spectrum import Spectrum
from rankprune.survey import Option, subject, survey
from rankprune.wrappers import unwrap

_TRIALS = 3
"""How often at most times are set right by a network as it would be decomposed."""


class Planner:
    """Surveys a model once, times it in `join` where the rule goes by latency, and plans from its weights as often as asked.

    Args:
        model: compile and DataParallel wrappers are looked through.
        scheme: ``"channel"``, ``"spatial"``, ``"decoupled"`` or ``"auto"`` (per layer, whichever serves the rule best).
        rule: decides the ranks.
        example_inputs: what the model is called with, a tensor, tuple or dict. Needed by rules that count MACs. What
            is cheaper is judged by what the rule counts; if it counts nothing, in MACs where these are given, otherwise in
            parameters.
        include, exclude: shell patterns on module names, see rankprune.layers.select.
        round_to: ranks are rounded up to a multiple of this.
        calibration: inputs like example_inputs, some hundred images or sequences. Given, errors are measured in the
            layers' outputs on them instead of in their weights; decompose with the same inputs.

    Attributes:
        decomposable: the layers that have a pair which is cheaper than they are, whatever their spectra.

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
        check_rule(rule)
        if rule.needs_inputs and example_inputs is None:
            what = "counts MACs" if rule.metric == "macs" else "needs times"
            raise RankPruneError(f"{rule!r} {what}: give example inputs, one batch as the model is called with")
        self.model = unwrap(model)
        self.scheme, self.rule, self.round_to = scheme, rule, round_to
        self.survey = survey(self.model, scheme, example_inputs, include, exclude)
        options = self.survey.options
        self._flat = {o.key: o for schemes in options.values() for o in schemes}
        counted = rule.metric if rule.metric in ("macs", "params") else self.survey.cost.known
        self.decomposable = frozenset(n for n, schemes in options.items() if any(o.pays(counted, round_to) for o in schemes))
        self.latency: NetworkLatency | None = None
        if rule.metric == "latency" and example_inputs is not None:
            tries = backend_named(rule.backend).ranks
            subjects = {name: subject(schemes, tries, round_to) for name, schemes in options.items()}
            worth = {name: each for name, each in subjects.items() if any(each.ranks.values())}
            self.latency = NetworkLatency(self.model, example_inputs, worth, rule.backend, rule.threads)
        else:
            self._choose_flat()
        self.factorizer = Factorizer(self.model, options, calibration)

    def join(self, team: Team) -> None:
        """From now on share the factorisations with the other processes of a team; all must then call the same methods.

        Where the rule goes by latency, the network is timed now, unless its times were loaded: by the first process, while the
        others wait for it. That can take minutes, so the team's time-out must be longer than that.

        Raises:
            RankPruneError: if latency cannot be measured here, or the budget in it cannot be met.
        """
        self.factorizer.share_out(team)
        if self.latency is not None:
            self.latency.measure(team, self._choose_flat)
            self._choose_flat()  # also with the times that were loaded, or corrected

    def _choose_flat(self, table: LatencyTable | None = None) -> Variant:
        """What the rule chooses where all singular values are equal. Raises if it cannot be met, whatever the spectra."""
        spectra = {key: Spectrum.of(torch.ones(1, o.full_rank, device="cpu")) for key, o in self._flat.items()}
        table = table or self._table
        return _variant(self._choice(self._candidates(spectra, table), self.rule, table))

    def plan(self, factored: Factored, rule: RankRule | None = None) -> Plan:
        """Let the rule (or another one in its place) choose for the present weights.

        Where it asks for more than is known of a layer, the whole layer is factored, into `factored`, and the rule asked again.
        """
        candidates, choices = self._settle(factored, rule or self.rule)
        decided = {name: self._decide(name, candidates[name], choice) for name, choice in choices.items()}
        entries = tuple(decided.get(name, entry) for name, entry in self.survey.dense.items())
        whole, table = self.survey.cost, self._table
        return Plan(
            layers=entries,
            macs_dense=whole.macs,
            params_dense=whole.params,
            scheme=self.scheme,
            rule=repr(rule or self.rule),
            uncounted=self.survey.uncounted,
            ms_dense=None if table is None else _in_ms(table.network_ns),
            ms_measured=None if table is None else _in_ms(table.measured_ns(_variant(choices))),
            setting=None if table is None else table.setting,
            input_shapes=() if table is None else table.input_shapes,
            calibrated=self.factorizer.calibrated,
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
            if self.latency.known.measured_ns(variant) is not None or not self.latency.correct(self.factorizer.team, variant):
                break

    def timed(self, plan: Plan) -> Plan:
        """The plan with the time that the network decomposed like this takes, where its rule goes by latency."""
        if self.latency is None or self.latency.table is None:
            return plan
        variant = {name: plan.choices[name] for name in plan.decomposed}
        if self.latency.known.measured_ns(variant) is None:
            self.latency.correct(self.factorizer.team, variant, fit=False)
        return replace(plan, ms_measured=_in_ms(self.latency.known.measured_ns(variant)))

    def _settle(self, factored: Factored, rule: RankRule) -> tuple[dict[str, list[Candidate]], dict[str, Choice]]:
        """The candidates of every layer and what the rule chooses, with as much factored as the choice needs."""
        team = self.factorizer.team
        while True:
            candidates = self._candidates(factored.spectra, self._table)
            # The first process's choice counts: a rule may be anybody's code, and may differ or fail in one process.
            choices = team.share(partial(self._choice, candidates, rule, self._table) if team.rank == 0 else dict)
            chosen = {(name, c.scheme): c.rank for name, c in choices.items() if c.scheme and c.rank}
            short = [key for key, rank in chosen.items() if rank > factored.spectra[key].known]
            if not short:
                return candidates, {name: _worthwhile(rule, candidates[name], choice) for name, choice in choices.items()}
            self.factorizer.complete(factored, short)

    @property
    def _table(self) -> LatencyTable | None:
        """The times that are known, where the rule goes by latency."""
        return None if self.latency is None else self.latency.known

    def _candidates(self, spectra: Mapping[Key, Spectrum], table: LatencyTable | None) -> dict[str, list[Candidate]]:
        """What a rule may choose from, for every layer."""
        return {
            name: [_candidate(o, spectra[o.key], self.round_to, table) for o in options]
            for name, options in self.survey.options.items()
        }

    def _choice(
        self, candidates: Mapping[str, list[Candidate]], rule: RankRule, table: LatencyTable | None
    ) -> dict[str, Choice]:
        """What the rule says of them."""
        network = self.survey.cost if table is None else replace(self.survey.cost, ns=table.network_ns)
        try:
            chosen = rule.choose(candidates, network)
        except RankPruneError:
            raise
        except Exception as error:  # of the user's own code
            raise RankPruneError(f"{rule!r} failed to choose: {type(error).__name__}: {error}") from error
        if not isinstance(chosen, Mapping) or not all(isinstance(choice, Choice) for choice in chosen.values()):
            raise RankPruneError(f"{rule!r} has to choose by a dict of one Choice for each layer")
        if unlike := candidates.keys() ^ chosen.keys():
            raise RankPruneError(f"{rule!r} has to choose for every layer it is given, and no other: see {sorted(unlike)[:3]}")
        return {name: _checked(rule, name, candidates[name], choice) for name, choice in chosen.items()}

    def _decide(self, name: str, candidates: Sequence[Candidate], choice: Choice) -> LayerPlan:
        static = self.survey.dense[name]
        if choice.scheme is None or choice.rank is None:
            return replace(static, reason=choice.reason)
        chosen = next(c for c in candidates if c.scheme == choice.scheme)
        error = float(chosen.spectrum.errors()[choice.rank])
        ranked = replace(static, scheme=choice.scheme, rank=choice.rank, full_rank=chosen.full_rank, error=error)
        if choice.reason is not None:
            return replace(ranked, reason=choice.reason)
        dense, pair = chosen.dense, chosen.cost(choice.rank)
        return replace(
            ranked,
            macs_after=pair.macs,
            params_after=static.params_before - dense.params + pair.params,
            ms_before=_in_ms(dense.ns),
            ms_after=_in_ms(pair.ns),
        )


def _checked(rule: RankRule, name: str, candidates: Sequence[Candidate], choice: Choice) -> Choice:
    """What a rule chose for a layer, its rank as a plain number, and a reason where it stays dense.

    Raises:
        RankPruneError: if it is none of what it could choose; a rule may be the user's own.
    """
    if choice.scheme is None or choice.rank is None:
        return Choice(reason=choice.reason or f"{rule!r} leaves it dense")
    known = {c.scheme: range(1, c.full_rank + 1) if c.pair_ns is None else list(c.pair_ns) for c in candidates}
    try:
        rank = operator.index(choice.rank)
        if rank in known[choice.scheme]:
            return replace(choice, rank=rank)
    except (TypeError, KeyError):
        pass
    told = {scheme: f"1 to {len(ranks)}" if isinstance(ranks, range) else ranks for scheme, ranks in known.items()}
    could = ", ".join(f"{scheme} at ranks {ranks}" for scheme, ranks in told.items())
    raise RankPruneError(f"{rule!r} chose {choice.scheme} at rank {choice.rank!r} for layer {name!r}; it could choose {could}")


def _worthwhile(rule: RankRule, candidates: Sequence[Candidate], choice: Choice) -> Choice:
    """The choice, or that a layer stays dense which would not become cheaper; rules of our own choose no such pair."""
    if choice.scheme is None or choice.rank is None or choice.reason is not None:
        return choice
    chosen = next(c for c in candidates if c.scheme == choice.scheme)
    metric = rule.metric or chosen.dense.known
    if chosen.cost(choice.rank).of(metric) < chosen.dense.of(metric):
        return choice
    return Choice(reason=f"{choice.scheme} at rank {choice.rank} of {chosen.full_rank}, as {rule!r} chose, is not cheaper")


def make_plan(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    scheme: str = "spatial",
    rule: RankRule,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    round_to: int = 1,
    calibration: Iterable[Inputs] | None = None,
) -> Plan:
    """Decide, from the weights as they are, which layers to decompose and at which rank. The model is left as it was.

    Arguments and errors are those of Planner and its join().

    >>> from rankprune.rules import RankFraction
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
    factored = planner.factorizer.factor(spectra_only=True)
    planner.correct_latency(factored)
    return planner.timed(planner.plan(factored))


def _candidate(option: Option, spectrum: Spectrum, round_to: int, table: LatencyTable | None) -> Candidate:
    dense, pair_ns = option.dense, None
    if table is not None:
        times = table.layers.get(option.layer.name, LayerTimes(0, {}))  # those without a rank to try are not timed
        dense, pair_ns = replace(dense, ns=times.dense_ns), times.pair_ns.get(option.scheme.name, {})
    return Candidate(option.scheme.name, spectrum, option.unit, dense, round_to, pair_ns)


def _in_ms(ns: int | None) -> float | None:
    return None if ns is None else ns / 1e6


def _variant(choices: Mapping[str, Choice]) -> Variant:
    return {name: (c.scheme, c.rank) for name, c in choices.items() if c.scheme and c.rank and c.reason is None}
