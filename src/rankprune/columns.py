"""Tables in plain text."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], padded: int | None = None) -> list[str]:
    """A line for each row, of which the first `padded` cells, by default all, are as wide as the widest in their column."""
    ends = len(rows[0]) if padded is None else padded
    widths = [max(len(row[i]) for row in rows) if i < ends else 0 for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
