"""Export to a file that another runtime runs, with a check that the file computes what the model does."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rankprune.backends import BACKENDS, FileBackend
from rankprune.backends.base import refused
from rankprune.backends.onnxruntime import OnnxRuntime
from rankprune.errors import ExportError, RankPruneError
from rankprune.files import check_folder
from rankprune.inputs import Inputs, cloned, first_alone, tensors, tried, with_one_more
from rankprune.passes import uncompiled, undisturbed
from rankprune.wrappers import unwrap

FILE_BACKENDS = {backend.suffix: backend for backend in BACKENDS.values() if isinstance(backend, FileBackend)}
"""The backends that run files, by what the files' names end in."""


def export(
    model: nn.Module, x: Inputs, path: str | Path, *, dynamic_batch: bool | None = None, tolerance: float = 1e-4
) -> float:
    """Write the model as a file, then run the file and compare.

    The suffix says for which runtime: ``.onnx`` (ONNX, opset 20, one file up to 1.5 GB), ``.xml`` (OpenVINO, with a .bin beside
    it), ``.pt2`` (AOTInductor), ``.pte`` (ExecuTorch with XNNPACK).

    Args:
        x: example inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        dynamic_batch: leave the first axis of every input tensor open, and compare at one example more, too, and at one
            alone, if the model can take that. None does so where the runtime can.
        tolerance: largest difference allowed between the two, relative to the largest output.

    Returns:
        The largest relative difference found.

    Raises:
        RankPruneError: for a suffix of no runtime, or a folder that is not there.
        MissingExtraError: without the runtime's packages.
        ExportError: if the model cannot be exported, or the file computes something else; then no file is written.
    """
    path = Path(path)
    if path.suffix not in FILE_BACKENDS:
        raise RankPruneError(f"cannot tell a runtime from {path.name!r}; end it in one of {', '.join(FILE_BACKENDS)}")
    return _export(FILE_BACKENDS[path.suffix], model, x, path, dynamic_batch, tolerance)


def export_onnx(model: nn.Module, x: Inputs, path: str | Path, *, dynamic_batch: bool = True, tolerance: float = 1e-4) -> float:
    """export() to ONNX, whatever the suffix."""
    return _export(OnnxRuntime(), model, x, Path(path), dynamic_batch, tolerance)


def _export(
    backend: FileBackend, model: nn.Module, x: Inputs, path: Path, dynamic_batch: bool | None, tolerance: float
) -> float:
    backend.require()
    check_folder(path)
    model = unwrap(model)
    with undisturbed(model), tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
        model, x = backend.placed_model(model), backend.placed(x)  # a GPU computes in another precision
        expected = _outputs(model, x)
        if not expected:
            raise ExportError(f"this {type(model).__name__} returns no tensors, so there is nothing to export and compare")
        draft = Path(folder) / path.name
        open_batch = backend.opens_batch if dynamic_batch is None else dynamic_batch
        try:
            backend.write(model, cloned(x), draft, open_batch)
            program = backend.read(draft, x)
            differences = _differences(expected, program(cloned(x)))
            for other, expected in _other_batches(model, x) if open_batch else ():
                differences += _differences(expected, program(other))
        except ExportError:
            raise
        except Exception as error:
            raise refused(model, backend.name, error, open_batch) from error
        if any(map(math.isnan, differences)):
            raise ExportError(
                f"the exported {type(model).__name__} or the model itself gives values on these inputs that are no numbers, so "
                "the two cannot be compared; no file was written"
            )
        if max(differences) > tolerance:
            raise ExportError(
                f"the exported {type(model).__name__} differs from the model by {max(differences):.2e} (relative), more than "
                f"{tolerance:.0e}; no file was written. If the model computes in reduced precision, give a larger tolerance"
            )
        for older in backend.sometimes_beside(path):
            older.unlink(missing_ok=True)
        for file in Path(folder).iterdir():
            file.replace(path.parent / file.name)
    return max(differences)


def _outputs(model: nn.Module, x: Inputs) -> list[Tensor]:
    """What the model gives as it is exported, without the fast path of TransformerEncoder."""
    with uncompiled(model):
        return tensors(tried(model, cloned(x)))


def _other_batches(model: nn.Module, x: Inputs) -> Iterator[tuple[Inputs, list[Tensor]]]:
    """Inputs larger by one example, and the first example alone, at which a model may take another way, with its outputs."""
    larger, first = with_one_more(x), first_alone(x)
    yield larger, _outputs(model, larger)
    try:
        expected = _outputs(model, first)
    except Exception:  # a model need not take a single one
        return
    yield first, expected


def _differences(expected: Sequence[Tensor], found: Sequence[Tensor]) -> list[float]:
    if len(expected) != len(found):
        raise ExportError(f"the model returns {len(expected)} tensors and the exported one {len(found)}; no file was written")
    return [_difference(a, b) for a, b in zip(expected, found, strict=True)]


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        raise ExportError(f"an output of shape {list(expected.shape)} became one of {list(found.shape)}; no file was written")
    if expected.is_complex() != found.is_complex():
        raise ExportError(f"an output of {expected.dtype} became one of {found.dtype}; no file was written")
    expected, found = _in_double(expected), _in_double(found)
    equal = expected == found  # infinities too
    if equal.all():
        return 0.0
    largest = expected.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1e-6)
    return float((expected - found)[~equal].abs().max() / largest)


def _in_double(values: Tensor) -> Tensor:
    values = values.detach().cpu()
    return torch.view_as_real(values.resolve_conj()).double() if values.is_complex() else values.double()
