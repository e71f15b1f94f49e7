"""The text of a model card: what a decomposed model costs, how it is loaded, and what became of each layer."""

import json
from collections.abc import Mapping, Sequence

from rankprune.plan import Plan

Results = Mapping[str, tuple[float | None, float]]
"""Measured figures by name, unit included: of the dense model, None if unknown, and of the decomposed one."""


def card_text(
    plan: Plan, *, architecture: str, source: str, builder: str | None, results: Results, revision: str | None = None
) -> str:
    """The Markdown of a card, without the metadata before it.

    Args:
        architecture: the name of the model's class.
        source: the repo id or the folder that the model is to be loaded from.
        revision: the branch or tag of that repository, if not its main one.
        builder: what builds the dense model, as ``package.module:callable``, or None if nobody recorded it.
    """
    return "\n\n".join(
        [
            f"# {architecture}, decomposed",
            "Layers of this network were replaced by pairs of thin ones, with rankprune.",
            _costs(plan, results),
            "## How to load it",
            f"```python\n{_loading(architecture, source, revision, builder)}\n```",
            "This needs `pip install 'rankprune[hub]'`. "
            + ("" if builder is None else f"`{_attribute(builder)}` is called with the arguments in config.json. ")
            + "No code that a file of this repository names is imported or run.",
            "## What became of each layer",
            f"Scheme `{plan.scheme}`, rule `{plan.rule}`.",
            _folded(f"{len(plan.decomposed)} layers decomposed", _decomposed(plan)),
            _folded(f"{len(plan.skipped)} layers left dense", _skipped(plan)),
            "",
        ]
    )


def _costs(plan: Plan, results: Results) -> str:
    rows = []
    if plan.macs is not None and plan.macs_dense is not None:
        rows.append(("MACs", f"{plan.macs_dense:,}", f"{plan.macs:,}", f"{plan.macs_dense / plan.macs:.2f}x fewer"))
    rows.append(("parameters", f"{plan.params_dense:,}", f"{plan.params:,}", f"{plan.params_dense / plan.params:.2f}x fewer"))
    rows += [(name, "" if dense is None else _figure(dense), _figure(small), "") for name, (dense, small) in results.items()]
    table = _table(("", "dense", "decomposed", ""), rows)
    if plan.macs is None:
        return table
    blind = f" Those of {', '.join(plan.uncounted)} could not be counted." if plan.uncounted else ""
    return f"{table}\n\nMACs are multiply-adds of one forward pass on the example batch that the plan was made with.{blind}"


def _loading(architecture: str, source: str, revision: str | None, builder: str | None) -> str:
    where = json.dumps(source, ensure_ascii=False)
    at = "" if revision is None else f", revision={json.dumps(revision, ensure_ascii=False)}"
    if builder is None:
        return "\n".join(
            [
                "from rankprune.integrations.hub import LowRank",
                "",
                f"dense = ...  # the {architecture} as it was built before it was decomposed",
                f"model = LowRank.from_pretrained({where}, dense{at}).model",
            ]
        )
    module, attribute = builder.split(":")[0], _attribute(builder)
    return "\n".join(
        [
            f"from {module} import {attribute.split('.')[0]}",
            "from rankprune.integrations.hub import LowRank",
            "",
            f"model = LowRank.from_pretrained({where}, {attribute}{at}).model",
        ]
    )


def _attribute(builder: str) -> str:
    return builder.split(":")[1]


def _decomposed(plan: Plan) -> str:
    rows = []
    for e in plan.decomposed.values():
        macs = ("", "") if e.macs_before is None else (f"{e.macs_before:,}", f"{e.macs_after:,}")
        shape, params = "x".join(map(str, e.shape)), (f"{e.params_before:,}", f"{e.params_after:,}")
        rows.append((f"`{e.name}`", f"{e.kind} {shape}", e.scheme or "", f"{e.rank} of {e.full_rank}", *macs, *params))
    return _table(("layer", "weight", "scheme", "rank", "MACs before", "after", "parameters before", "after"), rows)


def _skipped(plan: Plan) -> str:
    return _table(("layer", "reason"), [(f"`{name}`", reason) for name, reason in plan.skipped.items()])


def _figure(value: float) -> str:
    return f"{round(value, 4):,}" if abs(value) >= 0.1 or not value else f"{value:.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"
