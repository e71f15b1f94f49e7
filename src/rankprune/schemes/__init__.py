"""The decomposition schemes by name. A new scheme is one file and one entry here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from rankprune.errors import RankPruneError
from rankprune.schemes.base import CONVOLUTIONS, Key, Scheme
from rankprune.schemes.channel import Channel
from rankprune.schemes.decoupled import Decoupled
from rankprune.schemes.linear import Linear, is_linear
from rankprune.schemes.spatial import Spatial

__all__ = ["CHOICES", "CONVOLUTIONS", "SCHEMES", "Key", "Scheme", "check_choice", "is_linear", "schemes_for"]

SCHEMES: Mapping[str, Scheme[Any]] = MappingProxyType({s.name: s for s in (Channel(), Spatial(), Decoupled(), Linear())})
"""The first that can express a layer stands for it where none is chosen yet: the nuclear term takes its sub-gradient."""
CHOICES = (*(name for name in SCHEMES if name != Linear.name), "auto")
"""What users choose among, for convolutions."""


def check_choice(scheme: str) -> None:
    """Make sure that it is one of CHOICES.

    Raises:
        RankPruneError: if it is not.
    """
    if scheme not in CHOICES:
        raise RankPruneError(f"unknown scheme {scheme!r}; choose one of {', '.join(CHOICES)}")


def schemes_for(scheme: str, layer: nn.Module) -> tuple[tuple[Scheme[Any], ...], str | None]:
    """The schemes that the user's choice `scheme` (a name or ``"auto"``) means for `layer`.

    Linear layers always use the linear scheme.

    Returns:
        The schemes that can express the layer, under "auto" without those that repeat another; where there is none, also the
        reason.

    Raises:
        RankPruneError: if there is no such scheme.
    """
    check_choice(scheme)
    if is_linear(layer):
        return (SCHEMES[Linear.name],), None
    wanted = [SCHEMES[name] for name in (CHOICES[:-1] if scheme == "auto" else [scheme])]
    reasons = [s.unsupported(layer) for s in wanted]
    fitting = tuple(s for s, reason in zip(wanted, reasons, strict=True) if reason is None)
    if scheme == "auto":
        fitting = tuple(s for s in fitting if not s.repeats(layer))
    return fitting, None if fitting else reasons[0]
