"""Latencies that were measured, kept as JSON: one file for each machine, backend and setting."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

NOISY = 0.2
"""The spread, (third - first quartile) / median, beyond which a measurement decides nothing."""


def cache_folder() -> Path:
    """Where tables are kept: $RANKPRUNE_CACHE, or rankprune in the user's cache folder."""
    given = os.environ.get("RANKPRUNE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankprune"


class LatencyCache:
    """The measurements of one setting, by a text that says what was measured. Written after every one that is calm."""

    def __init__(self, setting: Mapping[str, Any]) -> None:
        self.setting = dict(setting)
        digest = hashlib.sha256(json.dumps(self.setting, sort_keys=True).encode()).hexdigest()[:12]
        self.path = cache_folder() / f"latency-{self.setting['backend']}-{digest}.json"

    def get(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is known under this key, or else what `measure` returns, kept unless its "spread" is too large."""
        known = self._read().get(key)
        if known is not None:
            return known
        measured = {**measure(), "date": date.today().isoformat()}
        if measured["spread"] <= NOISY:
            entries = {**self._read(), key: measured}  # another process may have written meanwhile
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps({"setting": self.setting, "measured": entries}, indent=1))
            draft.replace(self.path)
        return measured

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, json.JSONDecodeError):
            return {}
        return found["measured"] if found.get("setting") == self.setting else {}
