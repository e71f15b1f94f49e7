"""What rank rules choose from, made by hand."""

from hypothesis import strategies as st
from torch import Tensor

from rankprune.rules import Candidate, Cost
from rankprune.spectrum import Spectrum

Layers = dict[str, list[Candidate]]
SPECTRA = st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any)
"""Singular values of one layer."""


def candidate(values: Tensor, unit: int, dense: int, scheme: str = "channel", round_to: int = 1) -> Candidate:
    values = values.double().sort(descending=True).values
    return Candidate(scheme, Spectrum.of(values[None]), Cost(unit, 7 * unit), Cost(dense, 7 * dense), round_to)


def matrix_layer(values: Tensor, rows: int, columns: int) -> list[Candidate]:
    return [candidate(values, rows + columns, rows * columns)]
