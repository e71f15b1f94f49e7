"""int8 through ONNX Runtime."""

from pathlib import Path

import onnx
import onnx.numpy_helper
import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from rankprune.backends.onnxruntime import OnnxRuntime, quantize_onnx

pytest.importorskip("onnxruntime")


def test_quantized_file_is_smaller_and_computes_about_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 9)
    ).eval()
    x = torch.randn(8, 3, 12, 12)
    small = rp.decompose(model, rp.make_plan(model, x, scheme="channel", rule=rp.RankFraction(0.5)))
    rp.export_onnx(small, x, tmp_path / "float.onnx")
    quantize_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", [torch.randn(8, 3, 12, 12) for _ in range(4)])
    assert (tmp_path / "int8.onnx").stat().st_size < 0.6 * (tmp_path / "float.onnx").stat().st_size
    assert {f.name for f in tmp_path.iterdir()} == {"float.onnx", "int8.onnx"}
    expected = small(x).detach()
    (found,) = OnnxRuntime().read(tmp_path / "int8.onnx", x)(x)
    difference = float((found - expected).norm() / expected.norm())
    assert 1e-4 < difference < 0.1


@pytest.mark.parametrize("reduce_range", [True, False])
def test_weights_are_scaled_per_channel_in_as_many_bits_as_asked_for(tmp_path: Path, reduce_range: bool) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)).eval(), torch.randn(2, 3, 9, 9)
    rp.export_onnx(model, x, tmp_path / "float.onnx")
    quantize_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", [x], reduce_range=reduce_range)
    graph = onnx.load(tmp_path / "int8.onnx").graph
    values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    inputs = [node.input for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in values]
    weights = {w: scale for w, scale, *_ in inputs if values[w].ndim == 4}
    assert sorted(values[scale].shape for scale in weights.values()) == [(6,), (8,)]
    assert {64 < abs(values[w].astype(int)).max() <= 128 for w in weights} == {not reduce_range}


def test_what_cannot_be_quantized(tmp_path: Path) -> None:
    with pytest.raises(rp.RankPruneError, match=r"no ONNX file '.*none\.onnx'"):
        quantize_onnx(tmp_path / "none.onnx", tmp_path / "int8.onnx", [torch.zeros(1)])
    (tmp_path / "float.onnx").touch()
    with pytest.raises(rp.RankPruneError, match="calibration is empty"):
        quantize_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", [])
    with pytest.raises(rp.RankPruneError, match="calibration is one tensor"):
        quantize_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", torch.zeros(2, 3))
    with pytest.raises(rp.RankPruneError, match=r"no folder '.*nowhere'"):
        quantize_onnx(tmp_path / "float.onnx", tmp_path / "nowhere" / "int8.onnx", [torch.zeros(2, 3)])
    with pytest.raises(rp.ExportError, match=r"float\.onnx cannot be quantised \(.*INVALID"):
        quantize_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", [torch.zeros(2, 3)])
    assert {f.name for f in tmp_path.iterdir()} == {"float.onnx"}


class LeftAndRight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.left(left) + 1e-3 * self.right(right)


def test_inputs_by_name_in_any_order(tmp_path: Path) -> None:
    model = LeftAndRight().eval()
    batches = [{"right": 1000 * torch.randn(8, 16), "left": torch.randn(8, 16)} for _ in range(4)]
    expected = model(**batches[0]).detach()
    rp.export_onnx(model, {"left": batches[0]["left"], "right": batches[0]["right"]}, tmp_path / "float.onnx")
    torch.testing.assert_close(OnnxRuntime().read(tmp_path / "float.onnx", batches[0])(batches[0])[0], expected)
    quantize_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", batches)
    (found,) = OnnxRuntime().read(tmp_path / "int8.onnx", batches[0])(batches[0])
    assert float((found - expected).norm() / expected.norm()) < 0.05
    with pytest.raises(rp.RankPruneError, match=r"takes 2 inputs, \['left', 'right'\]; here are 1"):
        quantize_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", [batches[0]["left"]])


def test_grouped_transposed_convolutions_stay_in_float(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.ConvTranspose2d(32, 64, 3, groups=4, stride=2)).eval()
    x = torch.randn(8, 3, 8, 8)
    rp.export_onnx(model, x, tmp_path / "float.onnx")
    quantize_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", [x])
    (found,) = OnnxRuntime().read(tmp_path / "int8.onnx", x)(x)
    expected = model(x).detach()
    assert float((found - expected).norm() / expected.norm()) < 0.05
