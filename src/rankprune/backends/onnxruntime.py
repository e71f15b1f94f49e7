"""ONNX files, and ONNX Runtime on the CPU."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.backends.base import FileBackend, Program, arguments, tensors, with_open_batch
from rankprune.cost import Inputs
from rankprune.errors import MissingExtraError

OPSET = 20
"""The version of ONNX's operators that files are written in."""


class OnnxRuntime(FileBackend):
    """ONNX Runtime. BatchNorm is folded into the convolutions when a file is written."""

    name = "onnxruntime"
    package = "onnxruntime"
    extra = "onnx"
    suffix = ".onnx"

    def require(self) -> None:
        super().require()
        try:
            import onnxscript  # noqa: F401  what torch.onnx needs
        except ImportError as error:
            raise MissingExtraError("onnxscript", self.extra) from error

    def write(self, model: nn.Module, x: Inputs, path: Path, dynamic_batch: bool) -> None:
        args, kwargs = arguments(x)
        shapes = None
        if dynamic_batch:
            args, kwargs, shapes = with_open_batch(x, torch.export.Dim("batch"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            torch.onnx.export(
                model,
                args,
                path,
                kwargs=kwargs or None,
                dynamo=True,
                external_data=False,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                verbose=False,
            )

    def read(self, path: Path, threads: int | None = None) -> Program:
        return _program(str(path), threads)

    def load_each(self, models: Sequence[nn.Module], x: Inputs, threads: int | None = None) -> list[Program]:
        """One export for all, cut apart: most of an export's time does not depend on the model's size."""
        if len(models) < 2:
            return super().load_each(models, x, threads)
        self.require()
        import onnx.utils

        together = _SideBySide(models)
        args, kwargs = arguments(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(together, args, kwargs=kwargs or None, dynamo=True, opset_version=OPSET, verbose=False)
        proto = exported.model_proto if exported is not None else None
        assert proto is not None
        cut = onnx.utils.Extractor(proto)
        names = [i.name for i in proto.graph.input]
        return [_program(cut.extract_model(names, [o.name]).SerializeToString(), threads) for o in proto.graph.output]


class _SideBySide(nn.Module):
    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return tuple(model(*args, **kwargs) for model in self.models)


def _program(source: str | bytes, threads: int | None) -> Program:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads of other sessions would be in the way
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [slot.name for slot in session.get_inputs()]

    def program(x: Inputs) -> list[Tensor]:
        feed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors(x), strict=True)}
        return [torch.from_numpy(a) for a in session.run(None, feed)]

    return program


def quantize_onnx(source: str | Path, path: str | Path, calibration: Iterable[Inputs]) -> None:
    """Write an int8 form of an ONNX file: weights per channel, activations at the ranges seen on `calibration`.

    Post-training static quantisation by ONNX Runtime, with QuantizeLinear and DequantizeLinear around each operation. It
    composes with decomposition: give it the file that export_onnx wrote of a decomposed model.

    Args:
        source: a float32 file, as export_onnx writes it.
        calibration: inputs as the model is called with, some hundred images.

    Raises:
        MissingExtraError: without the packages of the extra "onnx".
    """
    try:
        from onnxruntime import InferenceSession
        from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxruntime", "onnx") from error
    names = [slot.name for slot in InferenceSession(str(source), providers=["CPUExecutionProvider"]).get_inputs()]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._inputs = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            x = next(self._inputs, None)
            return None if x is None else {n: t.cpu().numpy() for n, t in zip(names, tensors(x), strict=True)}

    prepared = Path(path).with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    try:
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
        )
    finally:
        prepared.unlink()
