"""What the callbacks of all trainers share: a TRP that is made when the training starts, since they come before its model."""

import inspect
import math
from typing import Any

import torch
from torch import nn

from rankprune.errors import RankPruneError
from rankprune.inputs import Inputs, on_device
from rankprune.rules import RankRule, check_rule
from rankprune.schedule import Schedule
from rankprune.trp import TRP


class OwnsTRP:
    """Keeps the settings of a TRP until there is a model in training, and then the TRP.

    Args:
        rule: decides the ranks at every projection, like ``Budget(macs=0.4)``.
        ramp, freeze: as in TRP in optimizer steps, or as floats from 0 to 1: shares of the whole training.
        example_inputs: as in TRP, on any device.
        name: what to call it where a training has several, with other layers each: in checkpoints and before its metrics.
        settings: the other arguments of TRP.

    Attributes:
        trp: the TRP of the present or the last training; None before the first.

    Raises:
        RankPruneError: for shares out of range, for what is no rule, a ramp for a rule that cannot be annealed, or as Schedule.
        TypeError: for an argument that TRP does not take.
    """

    def __init__(
        self,
        *,
        rule: RankRule,
        ramp: int | float = 0,
        freeze: int | float | None = None,
        example_inputs: Inputs | None = None,
        name: str = "",
        **settings: Any,
    ) -> None:
        for when, value in (("ramp", ramp), ("freeze", freeze)):
            if isinstance(value, float) and not 0 <= value <= 1:
                raise RankPruneError(
                    f"{when}={value}: give a share of the training from 0.0 to 1.0, or a whole number of steps"
                )
        if freeze is not None and isinstance(ramp, float) == isinstance(freeze, float) and freeze < ramp:
            raise RankPruneError(f"ramp={ramp}, freeze={freeze}: freeze no earlier than the end of the ramp")
        check_rule(rule, ramp)
        given = inspect.signature(TRP).bind(None, rule=rule, **settings)  # a TypeError for an argument that there is not
        given.apply_defaults()
        Schedule(rule, given.arguments["every"])
        super().__init__()  # the trainer's own class
        self.trp: TRP | None = None
        self.rule, self.ramp, self.freeze, self.example_inputs = rule, ramp, freeze, example_inputs
        self.name, self.settings = name, settings

    @property
    def needs_length(self) -> bool:
        """Whether ramp or freeze is a share of the training."""
        return isinstance(self.ramp, float) or isinstance(self.freeze, float)

    def start(self, model: nn.Module, total_steps: float, example_inputs: Inputs | None) -> TRP:
        """Make the TRP of a training of `total_steps` optimizer steps, in the place of an older one.

        Raises:
            RankPruneError: if a share is to be taken of a training without a known end, and whatever TRP raises.
        """
        if self.needs_length and not 0 < total_steps < math.inf:
            raise RankPruneError(
                f"ramp={self.ramp}, freeze={self.freeze}: the length of this training is not known; give whole numbers of "
                "steps, or give the trainer a maximum number of steps"
            )
        self.stop()
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.trp = TRP(
            model,
            rule=self.rule,
            ramp=round(self.ramp * total_steps) if isinstance(self.ramp, float) else self.ramp,
            freeze=round(self.freeze * total_steps) if isinstance(self.freeze, float) else self.freeze,
            example_inputs=None if example_inputs is None else on_device(example_inputs, device),
            **self.settings,
        )
        return self.trp

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Those of the TRP, each after its name or `prefix`; none before there is one."""
        found = {} if self.trp is None else self.trp.metrics()
        prefix = self.name or prefix
        return {f"{prefix}/{key}": value for key, value in found.items()} if prefix else found

    def stop(self) -> None:
        """Detach the TRP, if there is one."""
        if self.trp is not None:
            self.trp.detach()

    def finalize(self, into: nn.Module | None = None) -> nn.Module:
        """After the training, TRP.finalize: a decomposed copy of the model; `trp.plan` says how.

        Raises:
            RankPruneError: if no training has started yet, and whatever TRP.finalize raises.
        """
        if self.trp is None:
            raise RankPruneError(
                "there is nothing to decompose yet: no training has started with this callback, at least not in this process "
                "(of those that a strategy like ddp_spawn starts, nothing stays; ddp has no such trouble)"
            )
        return self.trp.finalize(into)
