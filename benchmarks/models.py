"""Decompose every architecture of the zoo in tests/zoo and write docs/models.md: python benchmarks/models.py, some minutes."""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

import rankprune as rp

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import conftest  # noqa: E402, F401  (defines what torchvision lacks where it is built for another torch)
from zoo import ZOO, Architecture, difference, run  # noqa: E402
from zoo.architecture import Inputs  # noqa: E402
from zoo.full_rank import full_rank_plan  # noqa: E402

HEAD = """# Models

{count} architectures, decomposed. Written by `python benchmarks/models.py` with {versions}.

`tests/test_zoo.py` asks of each that it computes the same at full rank, that a low-rank one has the MACs of its plan,
that plan and network survive saving and loading, that a step of training under TRP ends in an exact decomposition, that
tied weights stay tied, and that `generate()` still works.

The weights are random with spectra that decay, for nothing is downloaded: MACs at `Energy(0.9)` show that the rule
works, not what it does to a trained network. Those at `RankFraction(0.25)` depend on no weights. Many networks are
narrower, shallower or at smaller images than usual, which leaves less to save; `tests/zoo` has the settings. Detectors
run up to the outputs of their heads.

- *MACs* are the dense network's on this input; the two columns after it are those that remain, and how many times fewer
  they are.
- *left alone* counts what holds a matrix and stays as it is at `RankFraction(0.25)`, by reason: *no cheaper* is a layer
  whose pair costs as much, *read* one of which other code reads what a pair does not have, like `layer.weight.dtype`,
  *not run* one that is not called, so that its weight must be used in another way, *excluded* one that `tests/zoo`
  excludes, for its weight is read where a run does not show it. Names are those of types that no
  scheme knows.
- *difference* is that between the outputs of the dense network and of the one with every layer that can be decomposed
  at its full rank, first and last ones included: the largest, relative to the largest output, in float32.

{table}
"""
COLUMNS = ("library", "architecture", "task", "input", "scheme", "decomposed", "left alone")
FIGURES = ("MACs", "Energy(0.9)", "RankFraction(0.25)", "difference")
SHORT = {
    "the first convolution": "first convolution",
    "the last Linear": "last Linear",
    "its weight is shared": "tied",
    "other code reads": "read",
    "it does not run": "not run",
    "more than one argument": "several inputs",
    " costs ": "no cheaper",
    "is a subclass of": "subclass",
    "parametriz": "parametrized",
    "computed from other": "parametrized",
    "excluded by": "excluded",
}
"""What a reason holds, and a short word for it."""


def short(reason: str) -> str:
    """A reason in a word or two."""
    unknown = re.match(r"(\w+) layers are not supported", reason)
    return unknown.group(1) if unknown else next(word for part, word in SHORT.items() if part in reason)


def left_alone(plan: rp.Plan) -> str:
    """How many layers stay dense, by reason."""
    counted = Counter(short(reason) for reason in plan.skipped.values())
    return ", ".join(f"{count} {word}" for word, count in counted.most_common())


def shapes(x: Inputs) -> str:
    """The sizes of what a network is called with."""
    if isinstance(x, torch.Tensor):
        return " x ".join(map(str, x.shape))
    named = x.items() if isinstance(x, dict) else (("", value) for value in x)
    return ", ".join(f"{name} {shapes(value)}".strip() for name, value in named if isinstance(value, torch.Tensor))


def fewer(plan: rp.Plan) -> str:
    """The MACs that remain."""
    assert plan.macs is not None
    assert plan.macs_dense is not None
    return f"{plan.macs:,} ({plan.macs_dense / plan.macs:.2f}x)"


def row(architecture: Architecture) -> str:
    """The row of an architecture."""
    model, x, scheme = architecture.model(), architecture.inputs(), architecture.scheme
    lossless = rp.decompose(model, full_rank_plan(model, x, scheme, architecture.exclude))
    error = difference(run(lossless, x), run(model, x))
    energy, fraction = (
        rp.make_plan(model, x, scheme=scheme, rule=rule, exclude=architecture.exclude)
        for rule in (rp.Energy(0.9), rp.RankFraction(0.25))
    )
    cells = [architecture.library, architecture.name, architecture.task, shapes(x), scheme, str(len(fraction.decomposed))]
    cells += [left_alone(fraction), f"{fraction.macs_dense:,}", fewer(energy), fewer(fraction), f"{error:.0e}"]
    return line(cells)


def line(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write the table."""
    torch.set_num_threads(1)
    rows = [line((*COLUMNS, *FIGURES)), line(["---"] * len(COLUMNS) + ["--:"] * len(FIGURES))]
    for architecture in ZOO.values():
        rows.append(row(architecture))
        print(rows[-1], flush=True)
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "torchvision", "timm", "transformers"))
    text = HEAD.format(count=len(ZOO), versions=versions, table="\n".join(rows))
    (ROOT / "docs" / "models.md").write_text(text)


if __name__ == "__main__":
    main()
