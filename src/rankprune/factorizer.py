"""The weights of a model as matrices, factored as often as asked; each layer by one of the processes that train together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankprune import linalg
from rankprune.calibration import Whitenings, whitened, whitenings
from rankprune.distributed import Team, reshard
from rankprune.inputs import Inputs, check_batches
from rankprune.layers import Layer
from rankprune.linalg import Basis
from rankprune.plan import Plan
from rankprune.schemes import Key
from rankprune.spectrum import Spectrum
from rankprune.survey import Option


@dataclass
class Factored:
    """The weights of a moment, factored: everything known so far, by layer and scheme.

    `spectra` are those of all layers; `stacks` and `bases` those of the layers that this process owns.
    """

    spectra: dict[Key, Spectrum] = field(default_factory=dict)
    stacks: dict[Key, Tensor] = field(default_factory=dict)
    bases: dict[Key, Basis] = field(default_factory=dict)


class Factorizer:
    """Factors the present weights of some layers under every scheme they may get.

    Args:
        model: holds the layers.
        options: of each layer, one for each scheme; the first is the one that it has where no plan says otherwise.
        calibration: inputs to run the model on at each factorisation. Given, errors are those of the layers' outputs on them.

    Attributes:
        team: the processes that share out the work. All call the same methods in the same order.
        owner: for each layer the rank in the team of the process that factors it.
    """

    def __init__(
        self, model: nn.Module, options: Mapping[str, Sequence[Option]], calibration: Iterable[Inputs] | None = None
    ) -> None:
        self.options = options
        self._model, self._calibration = model, calibration
        if calibration is not None:
            check_batches(calibration)
        self.share_out(Team.alone())

    def share_out(self, team: Team) -> None:
        """From now on share the work with these processes."""
        self.team = team
        self.owner = team.owners({name: sum(map(_effort, options)) for name, options in self.options.items()})

    @property
    def calibrated(self) -> bool:
        """Whether errors are those of the layers' outputs on calibration inputs."""
        return self._calibration is not None

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers by name."""
        return {name: options[0].layer for name, options in self.options.items()}

    def weights(self) -> dict[str, nn.Parameter]:
        """The layers' weights by name; under FSDP2 the shards, also right after an evaluation."""
        reshard(self._model)
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
        every = (o.key for options in self.options.values() for o in options)
        self._factor_into(factored, every if keys is None else keys, starts, spectra_only)
        return factored

    @torch.no_grad()
    def complete(self, factored: Factored, keys: Iterable[Key]) -> None:
        """Factor whole those of `keys` of which only leading vectors are known so far."""
        spectra = {key: factored.spectra[key] for key in keys}
        if short := [key for key, spectrum in spectra.items() if spectrum.known < spectrum.full_rank]:
            self._factor_into(factored, short)

    def _factor_into(
        self,
        factored: Factored,
        keys: Iterable[Key],
        starts: Mapping[Key, Tensor] | None = None,
        spectra_only: bool = False,
    ) -> None:
        wanted, weights = set(keys), self.weights()
        options = {name: [o for o in options if o.key in wanted] for name, options in self.options.items()}
        own: dict[str, Tensor] = {}
        for name in filter(options.get, options):
            whole = self.team.whole(weights[name])  # all take part, owner or not
            if self.owner[name] == self.team.rank:
                own[name] = whole

        def spectra() -> dict[Key, Spectrum]:
            found = {}
            for stacks in self._stacks(own, [o for name in own for o in options[name]], apart=spectra_only):
                bases = linalg.bases_by_layer(stacks, starts)
                found |= {key: basis.spectrum.cpu() for key, basis in bases.items()}
                if not spectra_only:
                    factored.stacks |= stacks
                    factored.bases |= bases
            return found

        factored.spectra |= self.team.share(spectra)

    def _stacks(self, weights: Mapping[str, Tensor], options: Iterable[Option], apart: bool) -> Iterator[dict[Key, Tensor]]:
        """The matrices of whole weights, whitened where calibrated; all at once, or `apart`, as many as should be held."""
        layers = {o.key: (o.layer.module, o.scheme) for o in options}
        parts: Iterable[tuple[list[Key], Whitenings]] = [(list(layers), {})]
        if self._calibration is not None:
            parts = whitenings(self._model, layers, self._calibration)
        for keys, whites in parts:
            for held in linalg.in_parts({key: weights[key[0]].numel() for key in keys}) if apart else [keys]:
                matrices = {(name, s): layers[name, s][1].to_matrices(layers[name, s][0], weights[name]) for name, s in held}
                yield whitened(matrices, whites)
            del whites  # before the next are made

    def leading(self, plan: Plan, factored: Factored) -> dict[Key, Tensor]:
        """The leading vectors to start from next time: as many as the plan keeps, or cost the same under another scheme."""
        starts = {}
        for name, (scheme, kept) in plan.choices.items():
            chosen = next(o for o in self.options[name] if o.scheme.name == scheme)
            metric = chosen.unit.known
            for o in self.options[name]:
                basis, stack = factored.bases.get(o.key), factored.stacks.get(o.key)
                rank = -(-kept * chosen.unit.of(metric) // max(o.unit.of(metric), 1))
                if basis is not None and stack is not None and linalg.worth_starting(stack, rank):
                    starts[name, o.scheme.name] = basis.vectors[..., :rank].float().clone()
        return starts


def _effort(option: Option) -> float:
    """About how long the factorisation takes, in arbitrary units."""
    weight = option.layer.module.get_parameter("weight")
    return weight.numel() * option.full_rank
