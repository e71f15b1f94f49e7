"""OpenVINO on the CPU."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from rankprune.backends.base import FileBackend, Program, export_arguments, tensors
from rankprune.cost import Inputs


class OpenVino(FileBackend):
    """OpenVINO in float32; the CPU plugin would compute in bfloat16 where the processor can."""

    name = "openvino"
    package = "openvino"
    extra = "openvino"
    suffix = ".xml"
    cpu_only = True

    def _write(self, model: nn.Module, x: Inputs, path: Path, dynamic_batch: bool) -> None:
        import openvino

        args, kwargs, shapes = export_arguments(x, torch.export.Dim("batch") if dynamic_batch else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # OpenVINO's decompositions use what torch deprecates
            converted = openvino.convert_model(torch.export.export(model, args, kwargs, dynamic_shapes=shapes))
        openvino.save_model(converted, path, compress_to_fp16=False)

    def read(self, path: Path) -> Program:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.compile_model(path, "CPU", settings)
        request = compiled.create_infer_request()

        def program(x: Inputs) -> list[Tensor]:
            found = request.infer([t.detach().cpu().numpy() for t in tensors(x)], share_inputs=True)
            return [torch.from_numpy(found[slot]) for slot in compiled.outputs]

        return program
