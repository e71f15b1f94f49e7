"""PyTorch itself, as it is and compiled."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from rankprune.backends.base import Backend, Program
from rankprune.inputs import Inputs, call, tensors
from rankprune.passes import uncompiled


class Eager(Backend):
    """PyTorch, operation by operation, also where the model has compiled parts: its decomposed forms have none."""

    name = "eager"

    def _load(self, model: nn.Module, x: Inputs) -> Program:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return model(*args, **kwargs)

        return eager_program(model, x, run)


class Compiled(Backend):
    """torch.compile with its default settings. Loading forgets what was compiled before."""

    name = "compile"
    ranks = 6

    def _load(self, model: nn.Module, x: Inputs) -> Program:
        # Older versions keep on disk what they compiled, also for another number of threads.
        options: dict[str, Any] = {"cpp.threads": torch.get_num_threads()}
        return eager_program(model, x, torch.compile(model, dynamic=False, options=options))

    def _load_each(self, models: Sequence[nn.Module], x: Inputs) -> list[Program]:
        torch._dynamo.reset()
        with programs_of_one_code(len(models) + 8):
            return super()._load_each(models, x)


def programs_of_one_code(most: int) -> AbstractContextManager:
    """In the block torch.compile compiles the same code so often, instead of 8 times, before it runs it as it is."""
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    return torch._dynamo.config.patch({limit: most})  # type: ignore[attr-defined]


def eager_program(model: nn.Module, x: Inputs, run: Callable | None = None) -> Program:
    """The model in inference mode, by itself or as `run` runs it."""
    run = model if run is None else run  # compiled modules have no truth value

    def program(x: Inputs) -> list[torch.Tensor]:
        with torch.inference_mode():
            return tensors(call(run, x))

    with uncompiled(model):
        call(model, x)  # what the model caches at its first call must not be made in inference mode
    program(x)
    return program
