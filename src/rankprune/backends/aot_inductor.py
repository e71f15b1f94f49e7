"""AOTInductor: torch.export, compiled ahead of time to a library that runs without Python. It needs a C++ compiler."""

import warnings
from pathlib import Path

import torch
from torch import nn

from rankprune.backends.base import FileBackend, Program, exportable
from rankprune.errors import ExportError
from rankprune.inputs import Inputs, call, tensors


class AotInductor(FileBackend):
    """torch.export and AOTInductor.

    A file runs on the kind of device that the model was on when it was written, on as many threads as torch had then.
    """

    name = "aot_inductor"
    suffix = ".pt2"
    ranks = 6

    def _write(self, model: nn.Module, x: Inputs, path: Path, dynamic_batch: bool) -> None:
        from torch._inductor.utils import fresh_inductor_cache  # takes seconds

        e = exportable(model, x, torch.export.Dim("batch", min=1) if dynamic_batch else None)
        if e.model is not model:
            raise ExportError("a library cannot leave the batch of a forward(**kwargs) open; give dynamic_batch=False")
        program = e.export()
        frozen = {"freezing": True}  # folds BatchNorm, and packs weights as the kernels want them
        with (
            fresh_inductor_cache(),  # in which it would leave a library with all weights
            warnings.catch_warnings(action="ignore"),  # what freezing imports uses what torch deprecates
        ):
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=frozen)

    def read(self, path: Path, x: Inputs) -> Program:
        held = tensors(x)
        with torch.cuda.device_of(next((t for t in held if t.is_cuda), held[0])):  # of several GPUs it takes the present one
            model = torch._inductor.aoti_load_package(str(path))

        def program(x: Inputs) -> list[torch.Tensor]:
            with torch.inference_mode():
                return tensors(call(model, x))

        return program
