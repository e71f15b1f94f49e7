"""Export to ONNX, with a check that the file computes what the model does."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.cost import Inputs, call, undisturbed
from rankprune.errors import ExportError, MissingExtraError
from rankprune.layers import unwrap


def export_onnx(model: nn.Module, x: Inputs, path: str | Path, *, dynamic_batch: bool = True, tolerance: float = 1e-4) -> float:
    """Write the model as one ONNX file, then run the file in ONNX Runtime and compare.

    Args:
        x: example inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        dynamic_batch: leave the first axis of every input tensor open.
        tolerance: largest difference allowed between the two, relative to the largest output.

    Returns:
        The largest relative difference found.

    Raises:
        MissingExtraError: without the packages of the extra "onnx".
        ExportError: if the model cannot be exported, or the file computes something else; such a file is removed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  what torch.onnx needs
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxruntime", "onnx") from error
    model, path = unwrap(model), Path(path)
    args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else (x if isinstance(x, tuple) else (x,), {})
    shapes = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        shapes = [{0: batch} if isinstance(a, Tensor) and a.dim() else None for a in (*args, *kwargs.values())]
        args, kwargs = _at_least_two(args), dict(zip(kwargs, _at_least_two(tuple(kwargs.values())), strict=True))
    with undisturbed(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        expected = call(model, kwargs or args)
        try:
            torch.onnx.export(
                model,
                args,
                path,
                kwargs=kwargs or None,
                dynamo=True,
                external_data=False,
                dynamic_shapes=_like(shapes, args, kwargs),
                verbose=False,
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ExportError(
                f"{type(model).__name__} cannot be exported to ONNX ({reason}); try dynamic_batch=False, or export a part of it"
            ) from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    feed = {slot.name: tensor.cpu().numpy() for slot, tensor in zip(session.get_inputs(), tensors, strict=True)}
    found = session.run(None, feed)
    difference = max(_difference(a, torch.from_numpy(b)) for a, b in zip(_tensors(expected), found, strict=True))
    if not difference <= tolerance:
        path.unlink()
        raise ExportError(
            f"the exported {type(model).__name__} differs from the model by {difference:.2e} (relative), more than "
            f"{tolerance:.0e}; the file was removed. If the model computes in reduced precision, give a larger tolerance"
        )
    return difference


def _at_least_two(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs with a batch of at least two: a batch of one would be taken for a constant."""
    return tuple(torch.cat([a, a]) if isinstance(a, Tensor) and a.dim() and a.shape[0] == 1 else a for a in args)


def _like(shapes: list[Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if shapes is None:
        return None
    return dict(zip(kwargs, shapes, strict=True)) if kwargs else tuple(shapes[: len(args)])


def _tensors(output: Any) -> list[Tensor]:
    """All tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _difference(expected: Tensor, found: Tensor) -> float:
    expected, found = expected.detach().cpu().float(), found.float()
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-6))
