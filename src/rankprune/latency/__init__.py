"""Latency as a cost of layers, measured."""

from rankprune.latency.meter import LayerTimes, Setting, Subject, Variant
from rankprune.latency.network import NetworkLatency
from rankprune.latency.table import (
    LatencyTable,
    NoisyMeasurementWarning,
    measure_layer,
    ranks_to_try,
)

__all__ = [
    "LatencyTable",
    "LayerTimes",
    "NetworkLatency",
    "NoisyMeasurementWarning",
    "Setting",
    "Subject",
    "Variant",
    "measure_layer",
    "ranks_to_try",
]
