"""What a backend is: something that turns a PyTorch model into a program that runs elsewhere, or otherwise."""

import importlib
import inspect
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from rankprune.errors import ExportError, MissingExtraError, RankPruneError
from rankprune.inputs import Inputs, arguments, call, each_leaf, larger_by_one, leaves, on_device, tensors
from rankprune.passes import uncompiled
from rankprune.replacement import with_pairs

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CACHE = re.compile(r"\b\w*Cache\b")
_NO_REASON = re.compile(r"^Exception from \S*$|Next steps:$|^Failed to export the model|^backend='.*' raised:$")

T = TypeVar("T")

Program = Callable[[Inputs], list[Tensor]]
"""Runs a model: inputs as the model is called with -> all tensors in its output, in order."""


class Backend(ABC):
    """A way to run a network. A backend holds no state.

    Attributes:
        name: what users type.
        package: the package whose version matters, and which must be there.
        extra: the extra of rankprune that installs it; empty if torch brings it.
        ranks: how many ranks of a layer to try where latency is measured; fewer where a program takes long to make.
        cpu_only: whether its programs run on the CPU wherever the model is; others run where the model is.
        takes_threads: whether it lets us say how many threads to use.
    """

    name: ClassVar[str]
    package: ClassVar[str] = "torch"
    extra: ClassVar[str] = ""
    ranks: ClassVar[int] = 12
    cpu_only: ClassVar[bool] = False
    takes_threads: ClassVar[bool] = True

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        try:
            return find_spec(self.package) is not None
        except ModuleNotFoundError:  # its parent package is missing
            return False

    @property
    def version(self) -> str:
        """Its package's version."""
        return str(importlib.import_module(self.package).__version__)

    def require(self) -> None:
        """Make sure that it can be used.

        Raises:
            MissingExtraError: if its package is not installed.
        """
        try:
            importlib.import_module(self.package)
        except ImportError as error:
            raise MissingExtraError(self.package, self.extra) from error

    @property
    def threads(self) -> int:
        """How many threads its programs use that are loaded and run now."""
        return torch.get_num_threads()

    @contextmanager
    def on_threads(self, count: int | None) -> Iterator[None]:
        """Within, programs are loaded for so many threads, and run on so many; None leaves it at torch.get_num_threads().

        Raises:
            MissingExtraError: if the backend is not installed.
            RankPruneError: if it does not let us say so, and uses another number.
        """
        self.require()
        if count is not None and not self.takes_threads and count != self.threads:
            raise RankPruneError(
                f"threads={count}: {self.name} decides that by itself, here on {self.threads}; leave threads= out for it"
            )
        before = torch.get_num_threads()
        if count is not None:
            torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def placed(self, x: Any) -> Any:
        """Inputs where its programs take them: on the CPU, if they run nowhere else."""
        return on_device(x, "cpu") if self.cpu_only else x

    def placed_model(self, model: nn.Module) -> nn.Module:
        """The model where its programs run: a copy on the CPU, if they run nowhere else and it is not there."""
        elsewhere = any(t.device.type != "cpu" for t in (*model.parameters(), *model.buffers()))
        return with_pairs(model, {}, {}).cpu() if self.cpu_only and elsewhere else model

    def load(self, model: nn.Module, x: Inputs) -> Program:
        """The model, in eval mode, as a program for inputs of exactly the shapes of `x`, where placed() puts them.

        Raises:
            MissingExtraError: if the backend is not installed.
            ExportError: if it cannot take the model.
            torch.OutOfMemoryError: if there is too little memory.
        """
        return self.load_each([model], x)[0]

    def load_each(self, models: Sequence[nn.Module], x: Inputs) -> list[Program]:
        """load() for several models that are called alike; some backends are quicker at many."""
        self.require()
        x = self.placed(x)
        try:
            programs = self._load_each([self.placed_model(model) for model in models], x)
            for program in programs:
                program(x)  # some refuse only now
            return programs
        except (ExportError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise refused(models[0], self.name, error) from error

    def _load_each(self, models: Sequence[nn.Module], x: Inputs) -> list[Program]:
        return [self._load(model, x) for model in models]

    @abstractmethod
    def _load(self, model: nn.Module, x: Inputs) -> Program:
        """load(), once the package is there, and model and inputs are where its programs run. Any error may come of it."""


class FileBackend(Backend):
    """A backend that runs files. What it writes may be several files that begin alike; `suffix` is the main one's.

    Attributes:
        opens_batch: whether a file can leave the batch size open.
    """

    suffix: ClassVar[str]
    opens_batch: ClassVar[bool] = True

    def write(self, model: nn.Module, x: Inputs, path: Path, dynamic_batch: bool) -> None:
        """Write the model, in eval mode.

        Args:
            dynamic_batch: leave the first axis of every input tensor open.

        Raises:
            ExportError: if a file cannot leave it open, or the model cannot be written.
        """
        if dynamic_batch and not self.opens_batch:
            raise ExportError(f"a {self.suffix} file is for one batch size; give dynamic_batch=False")
        self._write(self.placed_model(model), self.placed(x), path, dynamic_batch)

    @abstractmethod
    def _write(self, model: nn.Module, x: Inputs, path: Path, dynamic_batch: bool) -> None:
        """write(), with model and inputs where its programs run."""

    @abstractmethod
    def read(self, path: Path, x: Inputs) -> Program:
        """The program in a file, for inputs like `x`, where they are, on as many threads as torch has now."""

    def sometimes_beside(self, path: Path) -> tuple[Path, ...]:
        """The files that writing to `path` makes for some models only, of which an older one would not fit a new file."""
        return ()

    def _load(self, model: nn.Module, x: Inputs) -> Program:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps files open that are mapped
            path = Path(folder) / f"model{self.suffix}"
            self.write(model, x, path, dynamic_batch=False)
            return self.read(path, x)


class SideBySide(nn.Module):
    """Models that are called alike as one, to be exported at once: most of an export's time does not depend on its size."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """All outputs, one model's after the other's."""
        return tuple(tensor for model in self.models for tensor in tensors(model(*args, **kwargs)))


def outputs_of_each(models: Sequence[nn.Module], x: Inputs, outputs: Sequence[T]) -> list[Sequence[T]]:
    """The outputs of SideBySide(models), whatever they have become, cut into those of each model."""
    counts = []
    for model in models:
        with uncompiled(model):
            counts.append(len(tensors(call(model, x))))
    ends = list(accumulate(counts))
    return [outputs[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def refused(model: nn.Module, backend: str, error: Exception, open_batch: bool = False) -> ExportError:
    """The error to raise for another one of a backend's."""
    advice, reason = "use another backend, or export a part of it", reason_of(error)
    if _CACHE.search(reason):  # that a language model of transformers returns
        advice = "set model.config.use_cache = False before planning, or export a part of it"
    elif open_batch:
        advice = "try dynamic_batch=False, or export a part of it"
    return ExportError(f"{type(model).__name__} cannot be exported to {backend} ({reason}); {advice}")


def reason_of(error: BaseException) -> str:
    """The first line with a reason in a runtime's error, or in what caused it."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    lines = (_COLOUR.sub("", line).strip() for cause in reversed(causes) for line in str(cause).splitlines())
    return next((line for line in lines if line and not _NO_REASON.search(line)), type(error).__name__)


@dataclass(frozen=True)
class Exportable:
    """What torch.export takes: a model, its arguments, and which axes are open, by the forward's parameters.

    `names` are those of the inputs where the model is one of tensors in order, and they had names.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: dict[str, Any] | None = None
    names: list[str] | None = None

    def export(self) -> torch.export.ExportedProgram:
        """The program."""
        return torch.export.export(self.model, self.args, self.kwargs, dynamic_shapes=self.shapes)


def exportable(
    model: nn.Module, x: Inputs, batch: Any = None, *, tensors_only: bool = False, in_order: bool = False
) -> Exportable:
    """A model called with `x`, in which the first axis of every tensor is `batch`; with None no axis is open.

    A batch of one is doubled, for torch.export would take it for a constant.

    Args:
        tensors_only: have no inputs but tensors; some runtimes would make inputs of flags and None, too.
        in_order: have the tensors as inputs in their order, whatever holds them.
    """
    args, kwargs = arguments(x)
    taken: Mapping[str, Any] = {}
    in_order |= tensors_only and not all(isinstance(leaf, Tensor) for leaf in leaves(x))
    if batch is not None:
        signature = inspect.signature(model.forward)
        taken = signature.bind(*args, **kwargs).arguments
        # torch.export opens no axis of what goes into **kwargs
        in_order |= any(p.kind is p.VAR_KEYWORD and p.name in taken for p in signature.parameters.values())
    if in_order:
        return replace(exportable(_OfTensors(model, x), tuple(tensors(x)), batch), names=_names_of_tensors(x))
    if batch is None:
        return Exportable(model, args, kwargs)

    def at_least_two(a: Any) -> Any:
        return larger_by_one(a) if isinstance(a, Tensor) and a.dim() and a.shape[0] == 1 else a

    def shape(a: Any) -> dict[int, Any] | None:
        return {0: batch} if isinstance(a, Tensor) and a.dim() else None

    return Exportable(model, each_leaf(at_least_two, args), each_leaf(at_least_two, kwargs), each_leaf(shape, dict(taken)))


def _names_of_tensors(x: Inputs) -> list[str] | None:
    """The names that the tensors in `x` go by, in order; None where some have none of their own."""
    names = [str(name) for name, value in x.items() if isinstance(value, Tensor)] if isinstance(x, Mapping) else []
    return names if names and len(names) == len(tensors(x)) else None


class _OfTensors(nn.Module):
    """A model as one of the tensors in `x` alone, in order; names and what is no tensor are a part of it."""

    def __init__(self, model: nn.Module, x: Inputs) -> None:
        super().__init__()
        self.model, self._x = model, x

    def forward(self, *values: Tensor) -> Any:
        """What the model gives for these tensors."""
        left = iter(values)
        return call(self.model, each_leaf(lambda a: next(left) if isinstance(a, Tensor) else a, self._x))
