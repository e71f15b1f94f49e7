"""ONNX files, and ONNX Runtime on the CPU."""

import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.backends.base import FileBackend, Program, SideBySide, exportable, outputs_of_each, reason_of
from rankprune.errors import ExportError, MissingExtraError, RankPruneError
from rankprune.files import check_folder
from rankprune.inputs import Inputs, arguments, check_batches, tensors

OPSET = 20
"""The version of ONNX's operators that files are written in."""

LIMIT = 1536 * 2**20
"""Bytes of weights that torch's exporter puts into one file. Those of larger models lie beside it, in ``.onnx.data``."""


class OnnxRuntime(FileBackend):
    """ONNX Runtime. BatchNorm is folded into the convolutions when a file is written."""

    name = "onnxruntime"
    package = "onnxruntime"
    extra = "onnx"
    suffix = ".onnx"
    cpu_only = True

    def require(self) -> None:
        super().require()
        try:
            import onnxscript  # noqa: F401  what torch.onnx needs
        except ImportError as error:
            raise MissingExtraError("onnxscript", self.extra) from error

    def _write(self, model: nn.Module, x: Inputs, path: Path, dynamic_batch: bool) -> None:
        e = exportable(model, x, torch.export.Dim("batch") if dynamic_batch else None, in_order=_is_nested(x))
        with _quietly():
            exported = torch.onnx.export(
                e.model,
                (*e.args, e.kwargs),
                path,
                input_names=e.names,
                dynamo=True,
                external_data=_bytes(model) > LIMIT,
                dynamic_shapes=e.shapes,
                opset_version=OPSET,
                verbose=False,
            )
        if dynamic_batch and exported is not None:
            _check_open(exported.exported_program)

    def sometimes_beside(self, path: Path) -> tuple[Path, ...]:
        return (_weights_of(path),)

    def read(self, path: Path, x: Inputs) -> Program:
        return _program(str(path))

    def _load_each(self, models: Sequence[nn.Module], x: Inputs) -> list[Program]:
        """One export for all, cut apart: most of an export's time does not depend on the model's size."""
        if len(models) < 2 or sum(map(_bytes, models)) > LIMIT or _is_nested(x):
            return super()._load_each(models, x)
        import onnx.utils

        args, kwargs = arguments(x)
        with _quietly():
            exported = torch.onnx.export(SideBySide(models), (*args, kwargs), dynamo=True, opset_version=OPSET, verbose=False)
        assert exported is not None
        proto = exported.model_proto
        if any(a.HasField("g") or a.graphs for node in proto.graph.node for a in node.attribute):
            return super()._load_each(models, x)  # a branch may use what the cutting does not see it to
        cut = onnx.utils.Extractor(proto)
        inputs, results = ([slot.name for slot in slots] for slots in (proto.graph.input, proto.graph.output))
        parts = [cut.extract_model(inputs, list(part)) for part in outputs_of_each(models, x, results)]
        return [_program(part.SerializeToString()) for part in parts]


def _check_open(program: Any) -> None:
    """Make sure that a program is for any batch: where it is not, torch's exporter to ONNX narrows the axis without a word."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    for symbol, values in program.range_constraints.items():
        of_data = free_unbacked_symbols(symbol)  # a size that the values in a tensor decide, and not the batch
        if not of_data and (values.upper < 2**31 or values.lower > 2):
            raise ExportError(
                f"the model computes something else for a batch below {values.lower} or above {values.upper}; try "
                "dynamic_batch=False, or export a part of it"
            )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's own deprecations, and what its optimizer tells of constants that it could not fold."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in chain(model.parameters(), model.buffers()))


def _weights_of(path: Path) -> Path:
    """Where the weights of a file are that has them not in it."""
    return path.with_name(f"{path.name}.data")


def session_options() -> Any:
    """How sessions run: on torch's threads, without messages."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads of other sessions would be in the way
    return options


def _program(source: str | bytes) -> Program:
    import onnxruntime

    session = onnxruntime.InferenceSession(source, session_options(), providers=["CPUExecutionProvider"])
    names = [slot.name for slot in session.get_inputs()]

    def program(x: Inputs) -> list[Tensor]:
        return [torch.from_numpy(a) for a in session.run(None, _feed(names, x))]

    return program


def _is_nested(x: Inputs) -> bool:
    """Whether inputs by name hold tensors deeper down, for which the exporter makes up names."""
    return isinstance(x, Mapping) and any(not isinstance(value, Tensor) and tensors(value) for value in x.values())


def _feed(names: Sequence[str], x: Inputs) -> dict[str, Any]:
    """The arrays for inputs of these names: by name where `x` has these names, else in order."""
    given = tensors(x)
    if isinstance(x, Mapping):  # torch.export writes names in lower case
        named = {str(name).lower(): value for name, value in x.items()} | dict(x)
        if named.keys() >= set(names):
            given = tensors([named[name] for name in names])
        elif named.keys() & set(names):
            raise RankPruneError(f"the file takes inputs named {list(names)}; here are {list(x)}")
    if len(given) != len(names):
        raise RankPruneError(f"the file takes {len(names)} inputs, {list(names)}; here are {len(given)}")
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, given, strict=True)}


def quantize_onnx(source: str | Path, path: str | Path, calibration: Iterable[Inputs], *, reduce_range: bool = True) -> None:
    """Write an int8 form of an ONNX file: weights per channel, activations at the ranges seen on `calibration`.

    Post-training static quantisation by ONNX Runtime, with QuantizeLinear and DequantizeLinear around each operation. It
    composes with decomposition: give it the file that export_onnx wrote of a decomposed model.

    Args:
        source: a float32 file, as export_onnx writes it.
        calibration: inputs as the model is called with, some hundred images.
        reduce_range: use 7 bits of each weight. x86 processors without VNNI saturate at 8; all others can have False.

    Raises:
        MissingExtraError: without the packages of the extra "onnx".
        RankPruneError: if there is no such file or folder, nothing to calibrate with, or another number of inputs.
        ExportError: if ONNX Runtime cannot read, run or quantise the file; then none is written.
    """
    try:
        import onnx
        from onnxruntime import InferenceSession
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxruntime", "onnx") from error
    source, path = Path(source), Path(path)
    if not source.is_file():
        raise RankPruneError(f"there is no ONNX file {str(source)!r}; export_onnx() writes one")
    check_folder(path)
    check_batches(calibration)
    if _weights_of(source).exists():
        raise ExportError(
            f"{source.name} keeps its weights in a file beside it, as those over 1.5 GB do; quantise smaller parts"
        )
    batches = iter(calibration)
    first = next(batches, None)
    if first is None:
        raise RankPruneError("calibration is empty: give inputs as the model is called with, some hundred images")

    class Reader(CalibrationDataReader):
        def __init__(self, names: Sequence[str]) -> None:
            self._names, self._inputs = names, chain([first], batches)

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            x = next(self._inputs, None)
            return None if x is None else _feed(self._names, x)

    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
        prepared, draft = Path(folder) / "prepared.onnx", Path(folder) / path.name
        try:
            names = [slot.name for slot in InferenceSession(str(source), providers=["CPUExecutionProvider"]).get_inputs()]
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)  # where that fails it litters
            quantize_static(
                str(prepared),
                str(draft),
                Reader(names),
                nodes_to_exclude=[node.name for node in onnx.load(prepared).graph.node if _is_grouped_transposed(node)],
                per_channel=True,
                activation_type=QuantType.QUInt8,  # times signed weights: x86 has an instruction for that
                weight_type=QuantType.QInt8,
                reduce_range=reduce_range,
            )
        except RankPruneError:
            raise
        except Exception as error:
            raise ExportError(
                f"{source.name} cannot be quantised ({reason_of(error)}); see that ONNX Runtime runs it on the calibration"
            ) from error
        draft.replace(path)


def _is_grouped_transposed(node: Any) -> bool:
    """Whether ONNX Runtime would confuse its channels where it scales per channel; such a node stays in float32."""
    return node.op_type == "ConvTranspose" and any(a.name == "group" and a.i > 1 for a in node.attribute)
