"""rankprune: train a network so that its layers become low-rank, then replace each by two thin ones, exactly."""

from rankprune.checkpoint import load, load_plan, save
from rankprune.cost import Count, count
from rankprune.decompose import decompose
from rankprune.errors import CheckpointError, ExportError, FactorizationError, MissingExtraError, RankPruneError
from rankprune.export import export, export_onnx
from rankprune.latency import NoisyMeasurementWarning
from rankprune.plan import LayerPlan, Plan
from rankprune.planner import make_plan
from rankprune.projection import project
from rankprune.rules import Budget, Energy, FixedRank, RankFraction, SingularValue
from rankprune.timing import Timing, measure
from rankprune.trp import TRP
from rankprune.version import VERSION as __version__

__all__ = [
    "TRP",
    "Budget",
    "CheckpointError",
    "Count",
    "Energy",
    "ExportError",
    "FactorizationError",
    "FixedRank",
    "LayerPlan",
    "MissingExtraError",
    "NoisyMeasurementWarning",
    "Plan",
    "RankFraction",
    "RankPruneError",
    "SingularValue",
    "Timing",
    "__version__",
    "count",
    "decompose",
    "export",
    "export_onnx",
    "load",
    "load_plan",
    "make_plan",
    "measure",
    "project",
    "save",
]
