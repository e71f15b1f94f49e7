"""PyTorch itself, as it is and compiled."""

from collections.abc import Callable, Iterator
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
    """torch.compile with its default settings."""

    name = "compile"
    ranks = 6

    def _load(self, model: nn.Module, x: Inputs, threads: int | None) -> Program:
        torch._dynamo.reset()  # or it gives up after some shapes of the same module
        return _program(model, torch.compile(model, dynamic=False), x, threads)


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
