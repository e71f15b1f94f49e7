"""Which layers include and exclude patterns choose."""

import pytest
from torch import nn

import rankprune as rp
from rankprune.layers import select


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.stage = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)


def chosen(model: nn.Module, **options: list[str] | None) -> list[str]:
    return [layer.name for layer in select(model, **options).layers]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["stage.0", "stage.2", "hidden"]),
        ({"include": ["*"]}, ["stem", "stage.0", "stage.2", "hidden", "head"]),
        ({"include": ["head", "stage.*"]}, ["stage.0", "stage.2", "head"]),
        ({"include": ["s*"], "exclude": ["stage.[1-9]"]}, ["stem", "stage.0"]),
        ({"exclude": ["stage.?", "st*"]}, ["hidden"]),
        ({"include": ["*"], "exclude": ["hidden"]}, ["stem", "stage.0", "stage.2", "head"]),
    ],
)
def test_include_and_exclude_choose_layers(options: dict, names: list[str]) -> None:
    assert chosen(Stages(), **options) == names


def test_each_choice_is_a_recorded_reason() -> None:
    reasons = {s.name: s.reason for s in select(Stages(), include=["st*"], exclude=["*.2"]).skipped}
    assert set(reasons) == {"stage.2", "hidden", "head"}
    assert "'*.2'" in reasons["stage.2"]
    assert "include" in reasons["hidden"]


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["stge.*", "stage", "stage.1", "STEM"])
def test_a_pattern_that_matches_no_layer_is_named(option: str, pattern: str) -> None:
    with pytest.raises(rp.RankPruneError, match=rf"{option} pattern '{pattern}'.*stem".replace("*'", r"\*'")):
        select(Stages(), **{option: [pattern]})


@pytest.mark.parametrize("model", [nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.LSTM(3, 3)), nn.Linear(3, 3)])
def test_a_model_without_a_layer_to_decompose_is_an_error(model: nn.Module) -> None:
    with pytest.raises(rp.RankPruneError, match=f"{type(model).__name__} has no layer to decompose"):
        rp.make_plan(model, rule=rp.FixedRank(1))
