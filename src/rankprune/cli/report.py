"""rankprune report."""

from pathlib import Path
from typing import Annotated

import typer

from rankprune.cli.console import say
from rankprune.report.plots import plot_results
from rankprune.report.tables import markdown_table, read_results, replace_between_marks


def report(
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("benchmarks/results"),
    into: Annotated[Path | None, typer.Option(help="Write the table between the marks in this Markdown file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw accuracy, spectra and ranks into this folder.")] = None,
) -> None:
    """A Markdown table of all results, and pictures of them."""
    found = read_results(results)
    table = markdown_table(found)
    if into is None:
        say(table)
    else:
        into.write_text(replace_between_marks(into.read_text(), table))
        say(f"table  {into}")
    if plots is not None:
        for file in plot_results(plots, found):
            say(f"plot   {file}")
