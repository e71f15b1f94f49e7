"""PyTorch itself, as it is and compiled."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rankprune.backends.base import Backend, Program, tensors
from rankprune.cost import Inputs, call, uncompiled


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
        return eager_program(model, x, torch.compile(model, dynamic=False))

    def _load_each(self, models: Sequence[nn.Module], x: Inputs) -> list[Program]:
        """Without the limit of programs for the same code, beyond which torch.compile runs a model as it is."""
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        torch._dynamo.reset()
        with torch._dynamo.config.patch({limit: len(models) + 8}):  # type: ignore[attr-defined]
            return super()._load_each(models, x)


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
