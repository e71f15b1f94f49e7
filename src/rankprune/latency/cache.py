"""Latencies that were measured, kept as JSON: one file for each machine, backend and setting."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

from rankprune.files import draft_of
from rankprune.version import VERSION

NOISY = 0.2
"""The spread, (third - first quartile) / median, beyond which a measurement decides nothing."""


def cache_folder() -> Path:
    """Where tables are kept: $RANKPRUNE_CACHE, or rankprune in the user's cache folder."""
    given = os.environ.get("RANKPRUNE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankprune"


class LatencyCache:
    """The measurements of one setting, by a text that says what was measured.

    Calm ones are remembered in this process and kept in a file, written after every one; others only as long as this object.
    """

    _remembered: ClassVar[dict[tuple[Path, str], tuple[dict[str, Any], bool]]] = {}

    def __init__(self, setting: Mapping[str, Any]) -> None:
        self.setting = {**setting, "rankprune": VERSION}  # which measures in its own way
        self._noisy: dict[str, dict[str, Any]] = {}
        digest = hashlib.sha256(json.dumps(self.setting, sort_keys=True).encode()).hexdigest()[:12]
        self.path = cache_folder() / f"latency-{self.setting['backend']}-{digest}.json"

    def get(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is known under this key, or else what `measure` returns, kept unless its "spread" is too large."""
        known = self._noisy.get(key) or self._recall(key)
        if known is None:
            with suppress(OSError):
                known = self._read().get(key)
            if known is not None:
                self._remembered[self.path, key] = known, True
        if known is None:
            known = {**measure(), "date": date.today().isoformat()}
            if known["spread"] > NOISY:
                self._noisy[key] = known
            else:
                self._remembered[self.path, key] = known, self._keep(key, known)
        return known

    def _recall(self, key: str) -> dict[str, Any] | None:
        """What is remembered; nothing of what was kept in a file that is gone: the user wants it measured again."""
        known, kept = self._remembered.get((self.path, key), (None, False))
        if kept and not self.path.is_file():
            for place in [place for place, (_, kept) in self._remembered.items() if kept and place[0] == self.path]:
                del self._remembered[place]
            return None
        return known

    def _keep(self, key: str, known: dict[str, Any]) -> bool:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            measured = {**self._read(), key: known}  # another process may have written meanwhile
            with draft_of(self.path) as draft:
                draft.write_text(json.dumps({"setting": self.setting, "measured": measured}, indent=1))
        except OSError as error:
            warnings.warn(f"cannot keep latencies in {str(self.path)!r} ({error}); set RANKPRUNE_CACHE", stacklevel=2)
            return False
        return True

    def _read(self) -> dict[str, Any]:
        """All that is kept; nothing if that is damaged. Raises OSError if it is there and may not be read."""
        try:
            found = json.loads(self.path.read_text())
            return found["measured"] if found["setting"] == self.setting else {}
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return {}
