from dataclasses import dataclass

import onnxruntime
import pytest
import torch
from torch import nn

import rankprune as rp
from rankprune.backends import BACKENDS, FileBackend
from rankprune.backends import onnxruntime as onnxruntime_backend
from rankprune.backends.base import reason_of, refused
from rankprune.backends.onnxruntime import OnnxRuntime
from rankprune.export import _difference, _differences
from rankprune.inputs import tensors, with_one_more


def small_network() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))
    x = torch.randn(1, 3, 8, 8)
    return rp.decompose(model, rp.make_plan(model, x, scheme="spatial", rule=rp.FixedRank(4))), x


def test_the_file_computes_what_the_model_does_at_any_batch_size(tmp_path):
    model, x = small_network()
    model.train()
    assert rp.export_onnx(model, x, tmp_path / "small.onnx") < 1e-5
    assert model.training
    assert [f.name for f in tmp_path.iterdir()] == ["small.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    many = torch.randn(7, 3, 8, 8)
    (found,) = session.run(None, {session.get_inputs()[0].name: many.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model.eval()(many), rtol=1e-4, atol=1e-5)


class Looping(nn.Module):
    """Takes its batch apart, so that it is exported for just that one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.square().sum(0) for part in x])


class Bounded(nn.Module):
    """Computes something else for large batches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1) if x.shape[0] <= 8 else x.amax(1)


class FromFour(nn.Module):
    """Computes something else for small batches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1) if x.shape[0] >= 4 else x.amax(1)


@pytest.mark.parametrize("model", [Looping(), Bounded(), FromFour()], ids=["fixed", "bounded", "bounded below"])
def test_a_batch_that_cannot_be_left_open_is_told(model: nn.Module, tmp_path):
    x = torch.randn(4, 3, 5)
    with pytest.raises(rp.ExportError, match="try dynamic_batch=False"):
        rp.export_onnx(model, x, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    assert rp.export_onnx(model, x, tmp_path / "m.onnx", dynamic_batch=False) < 1e-5


class OfOne(nn.Module):
    """Computes something else for a single example, which torch.export takes no notice of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1) if x.shape[0] > 1 else x.amax(1)


class OfSeveral(nn.Module):
    """Takes no single example."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] < 2:
            raise ValueError("too few")
        return x.mean(1)


def test_a_batch_of_one_is_compared_too_where_the_model_takes_it(tmp_path):
    x = torch.randn(4, 3, 5)
    with pytest.raises(rp.ExportError, match="differs from the model"):
        rp.export_onnx(OfOne(), x, tmp_path / "m.onnx")
    assert rp.export_onnx(OfOne(), x, tmp_path / "m.onnx", dynamic_batch=False) < 1e-5
    assert rp.export_onnx(OfSeveral(), x, tmp_path / "m.onnx") < 1e-5


class OfData(nn.Module):
    """Has sizes that the values in a tensor decide, which are no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(6) % 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.kept.nonzero().squeeze(1)].mean(1)


def test_sizes_that_are_no_batch_may_be_bounded(tmp_path):
    assert rp.export_onnx(OfData(), torch.randn(2, 6), tmp_path / "m.onnx") < 1e-5


def test_a_batch_larger_by_one_lies_in_memory_as_the_batch_did():
    for x in (torch.randn(2, 10, 16).transpose(1, 2), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)):
        larger = with_one_more(x)
        assert larger.stride() == x.stride()
        assert torch.equal(larger, torch.cat([x, x[:1]]))


def test_the_cache_that_a_language_model_returns_is_named():
    error = refused(nn.Linear(1, 1), "onnxruntime", TypeError("(Found <class 'DynamicCache'> in output, no known type"), True)
    assert str(error).endswith("set model.config.use_cache = False before planning, or export a part of it")


def test_another_number_of_outputs_is_told():
    with pytest.raises(rp.ExportError, match="returns 2 tensors and the exported one 1; no file"):
        _differences([torch.zeros(1), torch.zeros(1)], [torch.zeros(1)])


def test_what_one_onnx_file_cannot_hold_lies_beside_it(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    x = torch.randn(1, 3, 8, 8)
    monkeypatch.setattr(onnxruntime_backend, "LIMIT", 4 * sum(p.numel() for p in model.parameters()) - 1)
    assert rp.export_onnx(model, x, tmp_path / "large.onnx") < 1e-5
    assert {f.name for f in tmp_path.iterdir()} == {"large.onnx", "large.onnx.data"}
    elsewhere = tmp_path.rename(tmp_path.with_name("elsewhere"))  # the one names the other by its own folder
    session = onnxruntime.InferenceSession(str(elsewhere / "large.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)

    programs = OnnxRuntime().load_each([model, model[0]], x)
    assert all(torch.allclose(program(x)[0], m(x), atol=1e-5) for program, m in zip(programs, (model, model[0]), strict=True))


def test_keyword_inputs(tmp_path):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.linear(left) - self.linear(2 * right)

    x = {"left": torch.randn(2, 4), "right": torch.randn(2, 4)}
    assert rp.export_onnx(Named(), x, tmp_path / "named.onnx", dynamic_batch=False) < 1e-5


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, more: dict | list) -> torch.Tensor:
        other = more["other"][0] if isinstance(more, dict) else more[0]
        return self.linear(x) + other


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("form", [lambda other: [other, None], lambda other: {"other": (other,)}], ids=["list", "dict"])
def test_nested_inputs_and_their_open_batch(tmp_path, form, count):
    model = Nested()
    rp.export_onnx(model, (torch.randn(count, 4), form(torch.randn(count, 3))), tmp_path / "nested.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "nested.onnx")
    x, other = torch.randn(7, 4), torch.randn(7, 3)
    feed = {slot.name: a.numpy() for slot, a in zip(session.get_inputs(), (x, other), strict=True)}
    torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), model(x, form(other)).detach())


class Masked(nn.Module):
    """Logits that are minus infinity where they may not be chosen, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x).masked_fill(torch.tensor([False, True, False, False]), -torch.inf), x[:, :0]


def test_infinite_and_empty_outputs_are_compared_too(tmp_path):
    assert rp.export_onnx(Masked(), torch.randn(2, 4), tmp_path / "masked.onnx") < 1e-5


def test_outputs_of_other_shapes_or_infinities_differ():
    expected = torch.tensor([1.0, -torch.inf])
    assert _difference(expected, expected.clone()) == 0
    assert _difference(expected, torch.tensor([1.1, -torch.inf])) == pytest.approx(0.1)
    for other in ([1.0, torch.inf], [torch.inf, -torch.inf], [1.0, 0.0], [1.0, torch.nan]):
        assert not _difference(expected, torch.tensor(other)) <= 1e6
    with pytest.raises(rp.ExportError, match=r"an output of shape \[2\] became one of \[1, 2\]"):
        _difference(expected, expected[None])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("Exception from src/core.cpp:132:\nException from src/plugin.cpp:53:\nwhat is wrong\n"), "what is wrong"),
        (
            ValueError("Failed to export the model with torch.export. \x1b[96mThis is step 1/3\x1b[0m. Next steps:"),
            "ValueError",
        ),
        (ValueError("\x1b[31m\n  this\x1b[0m and that"), "this and that"),
        (KeyError(), "KeyError"),
    ],
)
def test_the_reason_is_found_among_the_words(error: Exception, reason: str):
    assert reason_of(error) == reason
    outer = RuntimeError("Failed to export the model with torch.export. Next steps:")
    outer.__cause__ = error
    assert reason_of(outer) == (reason if reason != type(error).__name__ else "RuntimeError")


def test_a_file_that_computes_something_else_is_removed(tmp_path, monkeypatch):
    model, x = small_network()
    read = OnnxRuntime.read

    def doubled(runtime, path, inputs):
        program = read(runtime, path, inputs)
        return lambda given: [2 * output for output in program(given)]

    monkeypatch.setattr(OnnxRuntime, "read", doubled)
    with pytest.raises(rp.ExportError, match=r"differs from the model by 1\.00e\+00"):
        rp.export_onnx(model, x, tmp_path / "small.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_exported_says_so(tmp_path):
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(rp.ExportError, match="Branching cannot be exported"):
        rp.export_onnx(Branching(), torch.ones(2, 2), tmp_path / "b.onnx", dynamic_batch=False)


@pytest.mark.parametrize(
    ("suffix", "files"),
    [
        (".onnx", {"small.onnx"}),
        (".xml", {"small.xml", "small.bin"}),
        pytest.param(".pt2", {"small.pt2"}, marks=pytest.mark.slow),
        pytest.param(".pte", {"small.pte"}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")  # the exporters' own
def test_the_suffix_says_for_which_runtime(suffix, files, tmp_path):
    pytest.importorskip({".xml": "openvino", ".pte": "executorch"}.get(suffix, "torch"))
    model, x = small_network()
    assert rp.export(model, x, tmp_path / f"small{suffix}") < 1e-5
    assert {f.name for f in tmp_path.iterdir()} == files
    backend = next(b for b in BACKENDS.values() if isinstance(b, FileBackend) and b.suffix == suffix)
    if backend.opens_batch:
        more = torch.randn(len(x) + 5, *x.shape[1:])
        (found,) = backend.read(tmp_path / f"small{suffix}", more)(more)
        torch.testing.assert_close(found, model.eval()(more), rtol=1e-3, atol=1e-4)
    with pytest.raises(rp.ExportError, match="differs from the model by"):
        rp.export(model, x, tmp_path / f"small{suffix}", tolerance=-1.0)
    assert {f.name for f in tmp_path.iterdir()} == files  # the good one is still there


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_executorch_file_is_for_one_batch_size(tmp_path):
    pytest.importorskip("executorch")
    with pytest.raises(rp.ExportError, match="one batch size"):
        rp.export(*small_network(), tmp_path / "small.pte", dynamic_batch=True)


def test_a_suffix_of_no_runtime(tmp_path):
    with pytest.raises(rp.RankPruneError, match=r"end it in one of \.onnx, \.xml, \.pt2, \.pte"):
        rp.export(*small_network(), tmp_path / "small.pth")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(rp.RankPruneError, match=r"there is no folder '.*none'.*small\.onnx"):
        rp.export(*small_network(), tmp_path / "none" / "small.onnx")


def test_the_opset_is_the_one_in_the_documentation(tmp_path):
    import onnx

    model, x = small_network()
    rp.export_onnx(model, x, tmp_path / "small.onnx")
    assert onnx.load(tmp_path / "small.onnx").opset_import[0].version == 20


def test_an_output_that_is_no_number_is_a_difference(tmp_path):
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, torch.log(x - 2)

    with pytest.raises(rp.ExportError, match="values on these inputs that are no numbers"):
        rp.export_onnx(Broken(), torch.ones(2, 3), tmp_path / "broken.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_the_runtime_cannot_read_is_not_left_behind(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).bfloat16()
    with pytest.raises(rp.ExportError, match="cannot be exported to onnxruntime"):
        rp.export_onnx(model, torch.randn(1, 3, 4, 4).bfloat16(), tmp_path / "half.onnx")
    assert not list(tmp_path.iterdir())


def test_an_older_files_weights_do_not_stay_beside_a_new_one(tmp_path, monkeypatch):
    model, x = small_network()
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime_backend, "LIMIT", 8)
        rp.export_onnx(model, x, tmp_path / "net.onnx")
    assert {f.name for f in tmp_path.iterdir()} == {"net.onnx", "net.onnx.data"}
    rp.export_onnx(model, x, tmp_path / "net.onnx")
    assert {f.name for f in tmp_path.iterdir()} == {"net.onnx"}


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


class Wrapped(nn.Linear):
    def forward(self, x: torch.Tensor) -> Answer:
        return Answer(super().forward(x), (x,))


class Silent(nn.Linear):
    def forward(self, x: torch.Tensor) -> str:
        return "nothing to compare"


def test_dataclasses_are_compared_and_what_holds_no_tensors_is_refused(tmp_path):
    torch.export.register_dataclass(Answer, serialized_type_name="test_export.Answer")
    x = torch.randn(2, 4)
    found = Wrapped(4, 3)(x)
    assert all(a is b for a, b in zip(tensors([found, {"again": found}]), [found.logits, x] * 2, strict=True))
    assert rp.export_onnx(Wrapped(4, 3), x, tmp_path / "net.onnx") < 1e-5
    with pytest.raises(rp.ExportError, match="returns no tensors, so there is nothing to export"):
        rp.export_onnx(Silent(4, 3), x, tmp_path / "other.onnx")


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_an_encoder_with_a_padding_mask_is_compared_as_it_is_exported(tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, mask = nn.TransformerEncoder(layer, 2), torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = True
    x = {"src": torch.randn(2, 6, 16), "src_key_padding_mask": mask}
    assert rp.export_onnx(model, x, tmp_path / "encoder.onnx", dynamic_batch=False) < 1e-4
