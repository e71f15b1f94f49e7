"""All rank rules by name, and a rule from its text. A new rule is one class and one entry here."""

import ast
from collections.abc import Mapping
from types import MappingProxyType

from rankprune.errors import RankPruneError
from rankprune.rules.base import Candidate, Choice, Cost, Metric, RankRule, break_even, check_rule
from rankprune.rules.budget import Budget
from rankprune.rules.local import Energy, FixedRank, LocalRule, RankFraction, SingularValue

__all__ = [
    "RULES",
    "Budget",
    "Candidate",
    "Choice",
    "Cost",
    "Energy",
    "FixedRank",
    "LocalRule",
    "Metric",
    "RankFraction",
    "RankRule",
    "SingularValue",
    "break_even",
    "check_rule",
    "parse_rule",
]

RULES: Mapping[str, type[RankRule]] = MappingProxyType(
    {rule.__name__: rule for rule in (Energy, SingularValue, FixedRank, RankFraction, Budget)}
)


def parse_rule(text: str) -> RankRule:
    """A rule from its text, as in Python: ``"Budget(macs=1/2.2)"``, ``"Energy(keep=0.98)"``; a number may be a fraction.

    Raises:
        RankPruneError: for anything else.
    """
    wrong = RankPruneError(f"cannot read the rule {text!r}; write it like Budget(macs=0.4) or Energy(keep=0.98)")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise wrong from error
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.func.id not in RULES:
        raise wrong
    try:
        return RULES[tree.func.id](*map(_value, tree.args), **{k.arg or "": _value(k.value) for k in tree.keywords})
    except (TypeError, SyntaxError, ZeroDivisionError) as error:
        raise wrong from error


def _value(node: ast.expr) -> float | int | str | None:
    """A text, or a number."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else _number(node)


def _number(node: ast.expr) -> float | int | None:
    """A constant, or the quotient of two."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return (_number(node.left) or 0) / (_number(node.right) or 0)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -(_number(node.operand) or 0)
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, int | float)):
        return node.value
    raise SyntaxError("not a number")
