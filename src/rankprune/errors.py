"""The exceptions. All derive from RankPruneError; messages name the failing value and the way out."""

import sys
from typing import Any


class RankPruneError(ValueError):
    """A user's mistake, or an input rankprune cannot work with."""


class FactorizationError(RankPruneError):
    """A layer's weight has no usable factorisation, even after a retry in float64 on the CPU."""


class CheckpointError(RankPruneError):
    """A file is missing, truncated, foreign, or does not fit the model it is loaded into."""


class ExportError(RankPruneError):
    """A model could not be exported, or its export computes something else."""


class MissingExtraError(RankPruneError, ImportError):
    """An optional dependency is not installed, or does not work here; raised where its import has failed."""

    def __init__(self, package: str, extra: str) -> None:
        cause = sys.exception()
        why = f", which cannot be imported ({str(cause).splitlines()[0]})" if cause is not None and str(cause) else ""
        super().__init__(f"this needs the package {package!r}{why}; install it with: pip install 'rankprune[{extra}]'")

    def __reduce__(self) -> tuple[Any, ...]:
        """By its text, not by what __init__ takes: it may come from another process."""
        return _restored, self.args


def _restored(*args: Any) -> MissingExtraError:
    error = MissingExtraError.__new__(MissingExtraError)
    error.args = args
    return error
