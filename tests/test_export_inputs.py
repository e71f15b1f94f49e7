"""How models are called, and what a file makes of that."""

import warnings
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from rankprune.backends import BACKENDS, backend_named
from rankprune.backends.onnxruntime import OnnxRuntime, quantize_onnx
from rankprune.comparison import compare
from rankprune.export import _difference
from rankprune.inputs import each_leaf, leaves, tensors


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 4)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.net(torch.cat([*args, *kwargs.values()], 1))


X = torch.randn(3, 2), torch.randn(3, 4)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
@pytest.mark.parametrize("x", [X, {"a": X[0], "b": X[1]}], ids=["by position", "by name"])
def test_a_forward_of_any_arguments_has_an_open_batch(suffix: str, x: Any, tmp_path: Path) -> None:
    assert rp.export(Several(), x, tmp_path / f"m{suffix}", dynamic_batch=True) < 1e-5


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(3.0))


class Documented(nn.Module):
    """As models of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, tokens: Tensor, mask: Tensor, twice: bool = False, **kwargs: object) -> Tensor:
        return self.net(self.net(tokens) if twice else tokens) * mask


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
@pytest.mark.parametrize("more", [{}, {"twice": True}, {"free": False}], ids=["plain", "flag", "free"])
def test_files_keep_the_names_of_inputs(suffix: str, more: dict, tmp_path: Path) -> None:
    x = {"tokens": torch.randn(2, 4), "mask": torch.ones(2, 4), **more}
    assert rp.export(Documented(), x, tmp_path / f"m{suffix}") < 1e-5
    if suffix == ".onnx":
        import onnx

        names = [slot.name for slot in onnx.load(tmp_path / "m.onnx").graph.input]
    else:
        import openvino

        names = [slot.get_any_name() for slot in openvino.Core().read_model(tmp_path / "m.xml").inputs]
    assert names == ["tokens", "mask"]


@dataclass
class Batch:
    first: Tensor
    flag: bool
    second: Tensor


class OwnMapping(MutableMapping):
    def __init__(self, **values: Any) -> None:
        self.held = values

    def __getitem__(self, name: str) -> Any:
        return self.held[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.held[name] = value

    def __delitem__(self, name: str) -> None:
        del self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def test_containers_of_all_kinds_are_gone_through_in_one_order() -> None:
    a, b, c = (torch.full((1, 2), float(i)) for i in range(3))
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    for x in (Batch(a, True, b), OwnMapping(one=a, two=(b, None)), {"x": [a, Batch(c, False, b)]}, (packed, "name")):
        seen: list[Any] = []
        moved = each_leaf(lambda leaf, seen=seen: seen.append(leaf) or (leaf + 1 if isinstance(leaf, Tensor) else leaf), x)
        assert [id(leaf) for leaf in seen] == [id(leaf) for leaf in leaves(x)]
        assert type(moved) is type(x)
        assert all(torch.equal(one, other + 1) for one, other in zip(tensors(moved), tensors(x), strict=True))
    assert torch.equal(a, torch.zeros(1, 2))


def test_inputs_stay_as_they_are_under_a_model_that_changes_them(tmp_path: Path) -> None:
    model, x = nn.Sequential(InPlace(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    before = x.clone()
    rp.export_onnx(model, x, tmp_path / "m.onnx")
    rp.measure(model, x, runs=1)
    rp.count(model, x)
    rp.make_plan(model, x, rule=rp.FixedRank(1))
    compare({"": model}, x, ["eager"], rounds=2)
    assert torch.equal(x, before)


class Sequenced(nn.Module):
    """Takes a tensor by name, and others in a tuple by name, as encoder_outputs of language models."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(4, width)

    def forward(self, ids: Tensor, states: tuple[Tensor, Tensor]) -> Tensor:
        return self.linear(ids + 2 * states[0] - states[1])


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_inputs_by_name_may_hold_several_tensors(dynamic_batch: bool, tmp_path: Path) -> None:
    x = {"ids": torch.randn(2, 4), "states": (torch.randn(2, 4), torch.randn(2, 4))}
    assert rp.export_onnx(Sequenced(), x, tmp_path / "m.onnx", dynamic_batch=dynamic_batch) < 1e-5
    models = [Sequenced().eval(), Sequenced(6).eval()]
    for model, program in zip(models, BACKENDS["onnxruntime"].load_each(models, x), strict=True):
        torch.testing.assert_close(program(x), [model(**x)], rtol=1e-4, atol=1e-5)


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x: Tensor, twice: bool = False, more: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        y = self.net(self.net(x) if twice else x)
        y = y if more is None else y + more
        return y if other is None else y * other


QUICK = [name for name, backend in BACKENDS.items() if backend.installed and name not in ("compile", "aot_inductor")]


@pytest.mark.parametrize("name", QUICK)
def test_arguments_that_are_no_tensors_are_a_part_of_the_program(name: str) -> None:
    model, x = Flagged().eval(), torch.randn(2, 4)
    for inputs in ((x, True), (x, False, None, x), {"x": x, "twice": True, "more": None, "other": x}):
        expected = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        (found,) = backend_named(name).load(model, inputs)(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_a_closed_file_has_the_shapes_of_the_example(suffix: str, tmp_path: Path) -> None:
    def sizes(path: Path) -> list[object]:
        if suffix == ".xml":
            import openvino

            return [d.to_string() for d in openvino.Core().read_model(path).inputs[0].get_partial_shape()]
        import onnx

        axes = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
        return [str(axis.dim_value) if axis.HasField("dim_value") else "?" for axis in axes]

    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8)
    rp.export(model, x, tmp_path / f"closed{suffix}", dynamic_batch=False)
    rp.export(model, x, tmp_path / f"open{suffix}")
    assert sizes(tmp_path / f"closed{suffix}") == ["2", "3", "8", "8"]
    assert sizes(tmp_path / f"open{suffix}") == ["?", "3", "8", "8"]


class Capital(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, Left: Tensor, Right: Tensor) -> Tensor:  # noqa: N803
        return self.net(Left) - 100 * Right


def test_inputs_by_name_are_found_in_another_case_and_told_where_they_are_not(tmp_path: Path) -> None:
    model, x = Capital().eval(), {"Left": torch.randn(2, 4), "Right": torch.randn(2, 4)}
    rp.export_onnx(model, x, tmp_path / "m.onnx")
    program = OnnxRuntime().read(tmp_path / "m.onnx", x)
    turned = dict(reversed(x.items()))
    torch.testing.assert_close(program(turned)[0], model(**x), rtol=1e-4, atol=1e-3)
    with pytest.raises(rp.RankPruneError, match=r"takes inputs named \['left', 'right'\]; here are \['right', 'other'\]"):
        quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", [{"right": x["Right"], "other": x["Left"]}])


class Branching(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.net, self.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor([scale]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return torch.cond(x.sum() > 0, lambda y: y * self.scale, lambda y: y - self.scale, (y,))


def test_many_programs_with_branches_at_once() -> None:
    models, x = [Branching(scale).eval() for scale in (2.0, 3.0)], torch.ones(2, 4)
    with warnings.catch_warnings(action="ignore"):  # of torch.cond itself
        programs = OnnxRuntime().load_each(models, x)
        for sign in (1, -1):
            for model, program in zip(models, programs, strict=True):
                torch.testing.assert_close(program(sign * x)[0], model(sign * x), rtol=1e-4, atol=1e-5)


def test_imaginary_parts_are_compared() -> None:
    a = torch.tensor([1 + 2j, 3 - 1j])
    assert _difference(a, a.clone()) == 0.0
    assert _difference(a, a.conj()) == pytest.approx(4 / 3)
    with pytest.raises(rp.ExportError, match="complex64 became one of"):
        _difference(a, a.real)
