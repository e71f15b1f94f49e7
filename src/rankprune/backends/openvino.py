"""OpenVINO on the CPU."""

import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.backends.base import FileBackend, Program, SideBySide, exportable, outputs_of_each
from rankprune.inputs import Inputs, cloned, tensors


class OpenVino(FileBackend):
    """OpenVINO in float32; the CPU plugin would compute in bfloat16 where the processor can."""

    name = "openvino"
    package = "openvino"
    extra = "openvino"
    suffix = ".xml"
    cpu_only = True

    def _write(self, model: nn.Module, x: Inputs, path: Path, dynamic_batch: bool) -> None:
        import openvino

        converted = _converted(model, x, dynamic_batch)
        openvino.save_model(converted, path, compress_to_fp16=False)

    def read(self, path: Path, x: Inputs) -> Program:
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = _core().compile_model(path, "CPU", settings)
        request = compiled.create_infer_request()

        def program(x: Inputs) -> list[Tensor]:
            found = request.infer([t.detach().cpu().numpy() for t in tensors(x)], share_inputs=True)
            return [torch.from_numpy(found[slot]) for slot in compiled.outputs]

        return program

    def _load_each(self, models: Sequence[nn.Module], x: Inputs) -> list[Program]:
        """One export for all, cut apart into files: what is converted shares its memory with tensors that do not outlive it."""
        import openvino

        whole = _converted(SideBySide(models), x, False)
        part_of: Any = openvino.Model  # the stubs have two of that name
        programs = []
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for i, results in enumerate(outputs_of_each(models, x, whole.get_results())):
                path = Path(folder) / f"{i}{self.suffix}"
                openvino.save_model(part_of(list(results), whole.get_parameters()), path, compress_to_fp16=False)
                programs.append(self.read(path, x))
        return programs


@cache
def _core() -> Any:
    """One core for the process.

    Of two, the one that is freed last gives its thread back the signal stack of the other, which is no longer mapped: the next
    signal that Python handles kills the process (seen with OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()


def _converted(model: nn.Module, x: Inputs, dynamic_batch: bool) -> Any:
    """The network for inputs of the shapes in `x`, the first axis of each open where asked: OpenVINO leaves all axes open."""
    import openvino

    x = cloned(x)  # one tensor given twice would be one input
    e = exportable(model, x, torch.export.Dim("batch") if dynamic_batch else None, tensors_only=True)
    with warnings.catch_warnings(action="ignore"):  # OpenVINO's decompositions use what torch deprecates
        converted = openvino.convert_model(e.export())
    axes = [[-1 if dynamic_batch and not axis else size for axis, size in enumerate(t.shape)] for t in tensors(x)]
    if e.names:
        for slot, name in zip(converted.inputs, e.names, strict=True):
            slot.get_tensor().set_names({name})
    converted.reshape({slot: openvino.PartialShape(sizes) for slot, sizes in zip(converted.inputs, axes, strict=True)})
    return converted
