"""Which settings of a run make a difference."""

from typing import Any

_NO_EFFECT = ("checkpoint_steps", "workers", "keep_gb")
"""They change how long a training takes, not where it ends."""
_ZERO_IS_ON = ("freeze",)


def in_force(settings: Any) -> Any:
    """`settings`, as JSON has them, without what has no effect and what is off (0, None, "").

    So runs outlive the arrival of an option that is off.
    """
    if not isinstance(settings, dict):
        return settings
    on = {name: value for name, value in settings.items() if value or (name in _ZERO_IS_ON and value is not None)}
    return {name: in_force(value) for name, value in on.items() if name not in _NO_EFFECT}
