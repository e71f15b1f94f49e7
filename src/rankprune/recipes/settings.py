"""Which settings of a run make a difference."""

from typing import Any

_NO_EFFECT = ("checkpoint_steps", "workers", "keep_gb")
"""They change how long a training takes, not where it ends."""
_ZERO_IS_ON = ("freeze",)


def differing(there: Any, here: Any, name: str = "") -> list[str]:
    """What differs between two settings, like "training.lr is 0.05 there, 0.1 here"."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys, prefix = {**there, **here}, f"{name}." if name else ""
        return [line for key in keys for line in differing(there.get(key), here.get(key), prefix + key)]
    return [] if there == here else [f"{name} is {there!r} there, {here!r} here"]


def in_force(settings: Any) -> Any:
    """`settings`, as JSON has them, without what has no effect and what is off (0, None, "").

    So runs outlive the arrival of an option that is off.
    """
    if not isinstance(settings, dict):
        return settings
    on = {name: value for name, value in settings.items() if value or (name in _ZERO_IS_ON and value is not None)}
    return {name: in_force(value) for name, value in on.items() if name not in _NO_EFFECT}
