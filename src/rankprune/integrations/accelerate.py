"""TRP in a loop of Accelerate's."""

from torch.optim import Optimizer

from rankprune.errors import MissingExtraError
from rankprune.trp import TRP

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as error:
    raise MissingExtraError("accelerate", "accelerate") from error


def attach(trp: TRP, accelerator: Accelerator, optimizer: Optimizer) -> TRP:
    """Attach `trp` to an optimizer that `accelerator` prepared, and put its state among those it saves and loads.

    Make the TRP from the prepared model, with example_inputs on ``accelerator.device``, and attach it before
    ``accelerator.load_state``. Under a budget of latency resume in another order, for attaching times the network unless the
    state with its times is there: ``accelerator.register_for_checkpointing(trp)``, ``accelerator.load_state(folder)``, and
    then attach. ``accelerator.log(trp.metrics(), step)`` logs ranks, MACs and overhead to every tracker.

    Under mixed precision Accelerate puts autocast around the model's forward, and what ``trp.finalize()`` returns has it, too:
    take it off by ``accelerator.unwrap_model(small, keep_fp32_wrapper=False)``.

    Args:
        trp: attached nowhere yet.
        accelerator: whose save_state and load_state take the state along.
        optimizer: as it came from ``accelerator.prepare``.

    Returns:
        `trp`.

    Raises:
        RankPruneError: whatever TRP.attach raises.
    """
    while isinstance(optimizer, AcceleratedOptimizer):  # has no hooks of its own
        optimizer = optimizer.optimizer
    trp.attach(optimizer)
    if not any(known is trp for known in accelerator._custom_objects):  # registered twice, it would be saved twice
        accelerator.register_for_checkpointing(trp)
    return trp
