"""Singular values of one layer, all of them or the leading ones: what rank rules judge by."""

from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 1e-12
"""Shares of energy below this are rounding."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a stack of matrices.

    Shapes: values (stack, known), descending, with known <= full_rank; energy (stack,), the sum of *all* squared values of each
    matrix. Where known < full_rank, figures beyond the known values are the best that the rest can be: a rule for
    single layers that chooses a rank within the known ones would choose the same with all of them at hand (a budget for the
    network nearly), and one that asks for more is asked again once they are there (see rankprune.planner.Planner.plan).
    At the projections of a training on a CPU, where the short side is 256 or more, values below a thousandth of the largest are
    rounding (see rankprune.linalg).
    """

    values: Tensor
    energy: Tensor
    full_rank: int

    @classmethod
    def of(cls, values: Tensor) -> "Spectrum":
        """All values: (stack, k), descending."""
        return cls(values, values.double().square().sum(-1), values.shape[-1])

    @property
    def known(self) -> int:
        """How many of the values are known."""
        return self.values.shape[-1]

    def cpu(self) -> "Spectrum":
        """The same on the CPU."""
        return Spectrum(self.values.cpu(), self.energy.cpu(), self.full_rank)

    def errors(self) -> Tensor:
        """The share of energy lost at rank 0, 1, ..., full_rank: (full_rank + 1,), from 1 down to 0. Mere rounding is 0."""
        energies = self.values.double().square().sum(0)
        rest = (self.energy.sum() - energies.sum()).clamp(min=0) if self.known < self.full_rank else energies.new_zeros(())
        tail = energies.flip(0).cumsum(0).flip(0) + rest
        steps = torch.arange(self.full_rank - self.known + 1, dtype=energies.dtype, device=energies.device)
        beyond = (rest - steps * energies[-1]).clamp(min=0)  # no unknown value is larger than the last known one
        beyond[-1] = 0
        errors = torch.cat([tail, beyond])
        total = errors[0].clamp(min=torch.finfo(errors.dtype).tiny)
        return torch.where(errors <= _ROUNDING * total, 0.0, errors / total)
