"""The ways to run a network, one file each. A new one is a class in a file of its own and an entry here."""

from collections.abc import Mapping
from types import MappingProxyType

from rankprune.backends.aot_inductor import AotInductor
from rankprune.backends.base import Backend, FileBackend, Program
from rankprune.backends.executorch import ExecuTorch
from rankprune.backends.onnxruntime import OnnxRuntime
from rankprune.backends.openvino import OpenVino
from rankprune.backends.pytorch import Compiled, Eager
from rankprune.errors import RankPruneError

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {b.name: b for b in (Eager(), Compiled(), OnnxRuntime(), OpenVino(), AotInductor(), ExecuTorch())}
)

__all__ = ["BACKENDS", "Backend", "FileBackend", "Program", "backend_named"]


def backend_named(name: str) -> Backend:
    """The backend of this name.

    Raises:
        RankPruneError: if there is none.
    """
    if name not in BACKENDS:
        raise RankPruneError(f"there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
