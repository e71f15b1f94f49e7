"""Tables in Markdown."""

from collections.abc import Sequence

from rankprune.errors import RankPruneError
from rankprune.report.tables import Table

BEGIN, END = "<!-- results: written by `rankprune report` -->", "<!-- end of results -->"


def markdown_table(table: Table) -> str:
    """The rows of a table without its title and note."""
    rule = ["---" if i < table.words else "--:" for i in range(len(table.columns))]
    return "\n".join([_line(table.columns), f"|{'|'.join(rule)}|", *map(_line, table.rows)])


def with_note(table: Table) -> str:
    """The rows, if there are any, and under them the note."""
    parts = [markdown_table(table) if table.rows else "", table.note]
    return "\n\n".join(part for part in parts if part)


def under_names(tables: Sequence[Table]) -> str:
    """Tables for a place below a heading, each under its title in bold where there are several."""
    titles = [f"**{_escaped(table.title)}**" for table in tables] if len(tables) > 1 else [""]
    return "\n\n".join(part for title, table in zip(titles, tables, strict=True) for part in (title, with_note(table)) if part)


def markdown(tables: Sequence[Table]) -> str:
    """Tables under their titles, each with its note."""
    return "\n\n".join(part for table in tables for part in (f"## {_escaped(table.title)}", with_note(table)) if part)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def replace_between_marks(text: str, table: str) -> str:
    """`text` with what stands between the two marks replaced by `table`.

    Raises:
        RankPruneError: if a mark is missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise RankPruneError(f"the file lacks the lines {BEGIN} and {END}, between which the table goes")
    return f"{head}{begin}\n{table}\n{end}{tail}"
