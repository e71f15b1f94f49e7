"""rankprune report."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from rankprune.cli.console import say, show_table
from rankprune.cli.options import refuse
from rankprune.files import draft_of
from rankprune.report.markdown import markdown, replace_between_marks, under_names
from rankprune.report.page import page
from rankprune.report.plots import plot_results
from rankprune.report.results import read_results
from rankprune.report.tables import overview, tables


def report(
    context: typer.Context,
    results: Annotated[
        list[Path] | None, typer.Argument(help="Folders of results, or their files.", show_default="benchmarks/results")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page.")] = None,
    into: Annotated[Path | None, typer.Option(help="Write the overview between the marks in this Markdown file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw accuracy, spectra and ranks into this folder.")] = None,
    each: Annotated[bool, typer.Option("--each", help="Print all about every run, also of several.")] = False,
    in_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Tables of runs side by side, or all about a single one; and a page, Markdown, or pictures of the same."""
    if not in_markdown and (html or into or plots):
        refuse(context, "each", because="no tables are printed without --markdown")
    found = read_results(results or [Path("benchmarks/results")])
    if len(found) == 1:
        refuse(context, "each", because="of a single run all is printed")
    tell = partial(say, error=in_markdown)  # which has standard output for itself
    if html is not None:
        html.write_text(page(found), encoding="utf-8", errors="xmlcharrefreplace")
        tell(f"page   {html}")
    if into is not None:
        text = replace_between_marks(into.read_text(encoding="utf-8"), under_names(overview(found)))
        with draft_of(into.resolve()) as draft:  # what was written by hand is never half there, and a link stays one
            draft.write_text(text, encoding="utf-8")
        tell(f"table  {into}")
    if plots is not None:
        for file in plot_results(plots, found):
            tell(f"plot   {file}")
    if in_markdown:
        say(markdown(tables(found, each)))
    elif html is None and into is None and plots is None:
        for table in tables(found, each):
            show_table(table.title, table.columns, table.rows, words=table.words, note=table.note)
