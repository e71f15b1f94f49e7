"""ExecuTorch with XNNPACK: what runs on phones, and here for checks."""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rankprune.backends.base import FileBackend, Program, exportable
from rankprune.errors import MissingExtraError
from rankprune.inputs import Inputs, tensors


class ExecuTorch(FileBackend):
    """ExecuTorch, lowered to XNNPACK, for one batch size.

    It has one pool of threads for all programs, and a change of their number breaks those that are loaded.
    """

    name = "executorch"
    package = "executorch"
    extra = "executorch"
    suffix = ".pte"
    opens_batch = False
    ranks = 6
    cpu_only = True
    takes_threads = False

    def require(self) -> None:
        try:
            from executorch.extension.pybindings import portable_lib  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:  # also where it was built for another torch
            raise MissingExtraError(self.package, self.extra) from error

    @property
    def version(self) -> str:
        from executorch.version import __version__  # pyright: ignore[reportMissingImports]

        return __version__

    @property
    def threads(self) -> int:
        from executorch.extension.pybindings import portable_lib  # pyright: ignore[reportMissingImports]

        return portable_lib._threadpool_get_thread_count()

    def _write(self, model: nn.Module, x: Inputs, path: Path, dynamic_batch: bool) -> None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # pyright: ignore[reportMissingImports]
        from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

        program = exportable(model, x, tensors_only=True).export()
        with warnings.catch_warnings(action="ignore"):  # it uses what torch deprecates
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            path.write_bytes(lowered.to_executorch().buffer)

    def read(self, path: Path, x: Inputs) -> Program:
        from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

        data = path.read_bytes()
        loaded = Runtime.get().load_program(data)
        method: Any = loaded.load_method("forward")

        def program(x: Inputs, needed: object = (data, loaded)) -> list[Tensor]:  # the method does not keep them alive
            return [t.clone() for t in tensors(method.execute(tensors(x)))]

        return program
