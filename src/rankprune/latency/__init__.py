"""Latency as a cost of layers, measured."""

from rankprune.latency.meter import LayerTimes, Setting, Subject, Variant
from rankprune.latency.table import (
    LatencyTable,
    NoisyMeasurementWarning,
    correct_table,
    measure_layer,
    measure_table,
    ranks_to_try,
)

__all__ = [
    "LatencyTable",
    "LayerTimes",
    "NoisyMeasurementWarning",
    "Setting",
    "Subject",
    "Variant",
    "correct_table",
    "measure_layer",
    "measure_table",
    "ranks_to_try",
]
