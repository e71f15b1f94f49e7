"""What test_distributed.py has the recipes' loop do in several processes."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import rankprune as rp
from coloured import coloured
from rankprune.recipes import runner, training
from rankprune.recipes.batches import TrainBatches
from rankprune.recipes.processes import Processes
from rankprune.recipes.progress import Progress
from rankprune.recipes.schedule import TrainConfig


def learner(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))  # without statistics of a batch


def recipe() -> None:
    """The recipes' loop averages gradients: on parts of batches it comes to the weights that it comes to on whole ones."""
    part = Processes(dist.get_rank(), dist.get_world_size()).part_of(8)
    for distill in (0.0, 0.7):
        config = TrainConfig(epochs=2, precision="float32", compile=False, distill=distill)
        whole_batches, parts = learner(), learner()
        log = training.train(whole_batches, TrainBatches(coloured(40), 8, pad=1), config, teacher=learner(1))
        ours = training.train(parts, TrainBatches(coloured(40), 8, pad=1, part=part), config, teacher=learner(1))
        assert [entry.loss for entry in ours] == pytest.approx([entry.loss for entry in log], rel=1e-4)
        for a, b in zip(whole_batches.parameters(), parts.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def recipe_killed() -> None:
    """Within an epoch, all processes at once: they go on from the first one's checkpoint to the same end."""
    part = Processes(dist.get_rank(), dist.get_world_size()).part_of(8)
    config = TrainConfig(epochs=2, precision="float32", compile=False, checkpoint_steps=2)

    def learn(checkpoint: Path | None = None, on_step: Callable[[Progress], None] | None = None) -> nn.Module:
        model = learner()
        trp = rp.TRP(model, rule=rp.FixedRank(2), every=2, include=["*"])
        batches = TrainBatches(coloured(40), 8, pad=1, part=part)
        training.train(model, batches, config, trp=trp, checkpoint=checkpoint, on_step=on_step)
        return model

    def kill(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (1, 4):
            raise KeyboardInterrupt

    checkpoint, steps = shared_folder() / "checkpoint.pt", []
    with pytest.raises(KeyboardInterrupt):
        learn(checkpoint, kill)
    resumed, straight = learn(checkpoint, lambda progress: steps.append((progress.epoch, progress.step))), learn()
    assert steps == [(1, 3), (1, 4), (1, 5)]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), straight.parameters(), strict=True))


def plan_once() -> None:
    """Of a network that is decomposed before it is trained the first process makes the plan, for all."""
    made = rp.make_plan(learner(), rule=rp.FixedRank(2), include=["*"])

    def make() -> rp.Plan:
        assert dist.get_rank() == 0
        return made

    assert runner._plan_once(shared_folder() / "plan" / "checkpoint.pt", make) == made


def shared_folder() -> Path:
    """One of the first process."""
    names = [tempfile.mkdtemp()]
    dist.broadcast_object_list(names)
    return Path(names[0])
