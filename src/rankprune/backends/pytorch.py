"""PyTorch itself, as it is and compiled."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from rankprune.backends.base import Backend, Program, tensors
from rankprune.cost import Inputs, call, undisturbed


class Eager(Backend):
    """PyTorch, operation by operation."""

    name = "eager"

    def _load(self, model: nn.Module, x: Inputs, threads: int | None) -> Program:
        return _program(model, model, x, threads)


class Compiled(Backend):
    """torch.compile with its default settings. Loading forgets what was compiled before."""

    name = "compile"
    ranks = 6

    def _load(self, model: nn.Module, x: Inputs, threads: int | None) -> Program:
        return _program(model, torch.compile(model, dynamic=False), x, threads)

    def _load_each(self, models: Sequence[nn.Module], x: Inputs, threads: int | None) -> list[Program]:
        """Without the limit of programs for the same code, beyond which torch.compile runs a model as it is."""
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        torch._dynamo.reset()
        with torch._dynamo.config.patch({limit: len(models) + 8}):  # type: ignore[attr-defined]
            return super()._load_each(models, x, threads)


def _program(model: nn.Module, run: Callable, x: Inputs, threads: int | None) -> Program:
    def program(x: Inputs) -> list[torch.Tensor]:
        with _threads(threads), torch.inference_mode():
            return tensors(call(run, x))

    with undisturbed(model), _threads(threads):
        call(model, x)  # what the model caches at its first call must not be made in inference mode
    program(x)
    return program


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
