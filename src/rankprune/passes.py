"""Forward passes that leave a model as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import nn

from rankprune.distributed import reshard
from rankprune.errors import RankPruneError


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; on leaving, restore its modes, buffers and shards and the random number generators."""
    reshard(model)
    modes = {m: m.training for m in model.modules()}
    buffers = {module: dict(module._buffers.items()) for module in modes}
    buffered = [b for b in model.buffers() if not b.is_meta and not isinstance(b, nn.UninitializedBuffer)]
    values = [(b, b.detach().clone()) for b in buffered]
    devices = sorted({t.device.index for t in (*model.parameters(), *model.buffers()) if t.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            try:
                model.eval()
            except NotImplementedError as error:
                raise RankPruneError(
                    f"this {type(model).__name__} has no eval mode, as after torch.export; use the model it was made from"
                ) from error
            yield
        finally:
            reshard(model)
            put_in_modes(modes)
            for module, before in buffers.items():
                for name in [name for name, _ in module._buffers.items() if name not in before]:
                    delattr(module, name)
                for name, buffer in before.items():
                    if name not in module._buffers or module._buffers[name] is not buffer:
                        module._buffers[name] = buffer
            for buffer, before in values:
                if buffer.layout != torch.strided or not torch.equal(buffer, before):  # an expanded one cannot be written to
                    buffer.copy_(before)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """`undisturbed`, for passes that hooks watch: what is compiled in the model runs as it is, for it would call no hooks.

    Nor does it meet the modes of such a pass, after which torch.compile would leave it alone for good. The fast path of
    MultiheadAttention is off, which calls no modules, or calls them with nested tensors.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with undisturbed(model), torch.compiler.set_stance("force_eager"):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


def put_in_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Put modules, parents before their children, in training or eval mode each.

    By their own train() where they have one, for it may do more than set a flag: merge weights, or change a traced graph.
    """
    for module, training in modes.items():
        if type(module).train is not nn.Module.train:
            with suppress(NotImplementedError):  # as after torch.export
                module.train(training)
    for module, training in modes.items():
        module.training = training
