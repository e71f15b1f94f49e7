"""Tables in plain text."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], kinds: str) -> list[str]:
    """A line for each row.

    Args:
        kinds: how each column is set: ``<`` and ``>`` as wide as the widest cell, to the left and to the right, ``-`` each cell
            as it is.
    """
    widths = [0 if kind == "-" else max(len(row[i]) for row in rows) for i, kind in enumerate(kinds)]
    cells = [[c.rjust(w) if k == ">" else c.ljust(w) for c, w, k in zip(row, widths, kinds, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]
