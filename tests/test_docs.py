"""The documentation: its tutorials run and print what they show, and its navigation and reference leave nothing out."""

import ast
import io
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import own_clock
import rankprune as rp
from rankprune.backends import Program
from rankprune.backends.onnxruntime import OnnxRuntime
from rankprune.cost import parameter_count
from rankprune.inputs import Inputs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
LONG = re.compile(r"\.pt[2e]\b")
"""In blocks whose files take long to make."""
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
FOREIGN = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")


def blocks(text: str) -> list[tuple[str, str | None]]:
    """The Python blocks of a page, on the lines they have there, each with the output shown right after it, if there is one."""
    found: list[tuple[str, str | None]] = []
    for block in BLOCK.finditer(text):
        if block[1] == "python":
            found.append(("\n" * text[: block.start(2)].count("\n") + block[2], None))
        else:
            if not found or found[-1][1] is not None:
                raise AssertionError(f"this output follows no code: {block[2]}")
            found[-1] = found[-1][0], block[2]
    return found


def alike(shown: str, printed: str) -> bool:
    """Whether two texts are the same but for white space, and numbers differ by less than 5 % or by 1 if whole."""
    figures, others = ([float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (shown, printed))
    same = [NUMBER.sub("#", text).split() for text in (shown, printed)]
    return (
        same[0] == same[1]
        and len(figures) == len(others)
        and all(
            math.isclose(a, b, rel_tol=0.05) or (a.is_integer() and b.is_integer() and abs(a - b) <= 1)
            for a, b in zip(figures, others, strict=True)
        )
    )


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What would change what pages show: threads, in the order of sums; times, for which ONNX Runtime goes by parameters."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    load_each = OnnxRuntime.load_each

    def timed(self: OnnxRuntime, models: Sequence[nn.Module], x: Inputs) -> list[Program]:
        programs = load_each(self, models, x)
        return [own_clock.timed(p, parameter_count(m) / 1e6) for p, m in zip(programs, models, strict=True)]

    monkeypatch.setattr(OnnxRuntime, "load_each", timed)
    own_clock.use(monkeypatch)
    yield
    torch.set_num_threads(threads)


def missing(source: str) -> list[str]:
    """The packages that a block imports and that are not installed."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return [package for package in dict.fromkeys(name.partition(".")[0] for name in names) if find_spec(package) is None]


def run(page: Path, *, also_long: bool) -> None:
    """Run the blocks of a page that can be, and compare what they print with what it shows.

    What the first one imports is needed by all; a later one is left out where a package of its own is missing.
    """
    code = blocks(page.read_text())
    assert code
    if missing(code[0][0]):
        pytest.skip(f"could not import {', '.join(missing(code[0][0]))}")
    namespace: dict[str, Any] = {"__name__": page.stem}
    for source, shown in code:
        if missing(source) or (LONG.search(source) and not also_long):
            continue
        output = io.StringIO()
        with redirect_stdout(output):
            exec(compile(source, str(page), "exec"), namespace)
        if shown is not None and not alike(shown, output.getvalue()):
            raise AssertionError(f"{page.name} shows\n{shown}\nbut the code above it printed\n{output.getvalue()}")


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_tutorial_runs_and_prints_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page, also_long=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in TUTORIALS if LONG.search(page.read_text())], ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore")  # the exporters' own
def test_a_tutorial_runs_with_what_takes_long(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page, also_long=True)


def test_a_block_that_needs_what_is_missing_is_left_out(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nimport sys\n```\n\n```python\nimport no_such.module\n```\n\n```python\nprint(1)\n```\n\n```text\n3\n```\n"
    )
    with pytest.raises(AssertionError, match=r"page\.md shows"):
        run(page, also_long=False)
    page.write_text("```python\nimport no_such\n```\n")
    with pytest.raises(pytest.skip.Exception, match="no_such"):
        run(page, also_long=False)


def test_outputs_are_compared() -> None:
    assert alike("rank 8 of 1,000\n  97.5 %", "rank  9 of 1,050 93.1 %\n")
    assert not alike("97.5 %", "92.0 %")
    assert not alike("rank 8", "rank 12")
    assert not alike("spatial 8", "channel 8")
    assert not alike("8", "8 9")


def test_blocks_keep_their_lines_and_outputs() -> None:
    page = "text\n\n```python\na = 1\n```\n\n```sh\nls\n```\n\n```python\nprint(a)\n```\n\n```text\n1\n```\n"
    assert blocks(page) == [("\n\n\na = 1\n", None), ("\n" * 11 + "print(a)\n", "1\n")]


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (rankprune[\w.]*)$", pages, re.MULTILINE)}
    assert set(rp.__all__) - documented == set()


def test_the_extras_are_those_of_the_package() -> None:
    defined = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    (table,) = re.findall(r"^\| extra \|.*\n(?:\|.*\n)+", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == defined
    named = {extra for page in DOCS.rglob("*.md") for extra in re.findall(r"rankprune\[(\w+)\]", page.read_text())}
    assert named
    assert named <= defined


def test_every_command_is_explained_with_options_that_it_has() -> None:
    typer = pytest.importorskip("typer")
    from rankprune.cli.app import app

    def options(command: Any, name: str) -> dict[str, set[str]]:
        if hasattr(command, "commands"):
            nested = (options(c, f"{name} {n}".strip()) for n, c in command.commands.items())
            return {key: value for one in nested for key, value in one.items()}
        return {name: {option for p in command.params for option in (*p.opts, *p.secondary_opts) if option.startswith("--")}}

    known = options(typer.main.get_command(app), "")
    text = (DOCS / "command-line.md").read_text()
    headings = " ".join(re.findall(r"^## (.*)", text, re.MULTILINE))
    assert {name for name in known if f"`{name}`" not in headings} == set()
    for page in (text, (ROOT / "README.md").read_text()):
        for line in re.findall(r"^rankprune (.*)$", page, re.MULTILINE):
            (name,) = (name for name in known if f"{line} ".startswith(f"{name} "))
            assert set(re.findall(r"--[a-z-]+", line)) <= known[name], line
    assert set(re.findall(r"--[a-z-]+", text)) <= set().union(*known.values(), {"--help"})


def test_every_page_is_in_the_navigation() -> None:
    yaml = pytest.importorskip("yaml")

    def listed(entry: Any) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        return set().union(*map(listed, entry.values() if isinstance(entry, dict) else entry))

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert listed(nav) == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_asks_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    assert {page.name: FOREIGN.findall(page.read_text()) for page in pages if FOREIGN.search(page.read_text())} == {}
    assert "<math" in (tmp_path / "method.html").read_text()
    assert "arithmatex" not in (tmp_path / "method.html").read_text()
