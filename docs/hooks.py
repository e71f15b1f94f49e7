"""What the site adds to its Markdown, as hooks of MkDocs: formulas as MathML, which needs no script, and the README's table."""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_RESULTS = re.compile(r"<!-- results: .*?-->.*?<!-- end of results -->", re.DOTALL)
_HERE = '*The table of results: in `README.md` below "What it does", on the site here.*'


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the README's table of results where a page asks for it."""
    if _HERE not in markdown:
        return markdown
    found = _RESULTS.search(Path("README.md").read_text())
    if found is None:
        raise ValueError("README.md lacks the marks that `rankprune report` writes its table between")
    return markdown.replace(_HERE, found[0])


def on_page_content(content: str, **_: Any) -> str:
    """Turn the LaTeX that pymdownx.arithmatex found into MathML."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[2] == "[" else "inline"
    return convert(html.unescape(found[3]), display=display)
