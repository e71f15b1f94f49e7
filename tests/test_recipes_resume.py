"""A training that was interrupted goes on to the same end, to the bit, or says why it does not."""

import copy
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rankprune as rp
from rankprune.recipes.progress import Progress
from rankprune.recipes.training import train
from small_training import CONFIG, KilledError, batches, exactly_same, kill_in_epoch, network, pruning


@pytest.mark.parametrize("checkpoint_steps", [0, 1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("pruned", [False, True])
def test_killed_and_called_again_is_uninterrupted(tmp_path: Path, pruned: bool, dropout: float, checkpoint_steps: int) -> None:
    config = replace(CONFIG, checkpoint_steps=checkpoint_steps)

    def call(seed: int, checkpoint: Path | None, on_step: Callable | None = None) -> tuple:
        model = network(seed, dropout)
        trp = pruning(model) if pruned else None
        return model, train(model, batches(seed=4), config, trp=trp, checkpoint=checkpoint, on_step=on_step), trp

    whole, log, trp = call(0, None)
    expected = copy.deepcopy(whole)  # finalize projects, and changes weights by rounding
    path = tmp_path / "runs" / "checkpoint.pt"
    with pytest.raises(KilledError):
        call(0, path, kill_in_epoch(1))
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]
    torch.rand(3)
    steps: list[Progress] = []
    resumed, log2, trp2 = call(1, path, steps.append)
    assert (steps[0].epoch, steps[0].step) == (1, 2 if checkpoint_steps == 1 else 1)
    exactly_same(resumed, whole)
    assert [(e.epoch, e.loss, e.ranks) for e in log2] == [(e.epoch, e.loss, e.ranks) for e in log]
    if trp:
        assert (trp2.steps, trp2.plan, trp2.history) == (12, trp.plan, trp.history)
        exactly_same(trp2.finalize(), trp.finalize())
    steps.clear()
    again, log3, _ = call(2, path, steps.append)  # finished: nothing is left to do
    exactly_same(again, expected)
    assert (log3, steps) == (log2, [])


KILLED = """
import os, signal, sys, torch
from dataclasses import replace
from pathlib import Path
from rankprune.recipes.training import train
from small_training import CONFIG, batches, network, pruning

def kill(progress):
    if (progress.epoch, progress.step) == (1, 4):
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(int(sys.argv[2]))
model = network(0, 0.3)
train(model, batches(), replace(CONFIG, checkpoint_steps=3), trp=pruning(model), checkpoint=Path(sys.argv[1]), on_step=kill)
"""


def test_a_killed_process_is_gone_on_from_in_the_middle_of_its_epoch(tmp_path: Path) -> None:
    path, threads = tmp_path / "checkpoint.pt", torch.get_num_threads()
    command = [sys.executable, "-c", KILLED, str(path), str(threads)]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=250)
    assert run.returncode == -signal.SIGKILL, run.stderr
    resumed, whole = network(1, 0.3), network(0, 0.3)
    steps: list[Progress] = []
    config = replace(CONFIG, checkpoint_steps=2)  # how often they are written may change
    log = train(resumed, batches(), config, trp=pruning(resumed), checkpoint=path, on_step=steps.append)
    assert (steps[0].epoch, steps[0].step, len(steps)) == (1, 4, 5)
    torch.manual_seed(0)
    whole = network(0, 0.3)
    assert [e.loss for e in train(whole, batches(), CONFIG, trp=pruning(whole))] == [e.loss for e in log]
    exactly_same(resumed, whole)


def test_a_checkpoint_without_the_later_options_is_gone_on_from(checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    settings = json.loads(state["settings"])
    del settings["training"]["label_smoothing"]
    for entry in state["log"]:
        del entry["input_share"]
    former = {k: v for k, v in state.items() if k not in ("step", "loss_sum", "seconds", "waited")}
    torch.save({**former, "settings": json.dumps(settings)}, checkpoint)
    model = network(1)
    log = train(model, batches(), replace(CONFIG, epochs=1), trp=pruning(model), checkpoint=checkpoint)
    assert [e.epoch for e in log] == [0]
    whole = network()
    train(whole, batches(), replace(CONFIG, epochs=1), trp=pruning(whole))
    exactly_same(model, whole)
    with pytest.raises(rp.CheckpointError, match="another config"):
        train(model, batches(), replace(CONFIG, epochs=1, label_smoothing=0.1), trp=pruning(model), checkpoint=checkpoint)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = network()
    train(model, batches(), replace(CONFIG, epochs=1), trp=pruning(model), checkpoint=tmp_path / "c.pt")
    return tmp_path / "c.pt"


OTHER = {
    "learning rate": {"config": replace(CONFIG, epochs=1, lr=0.1)},
    "epochs": {"config": replace(CONFIG, epochs=2)},
    "no pruning": {"trp": None},
    "other rule": {"trp": {"rule": rp.Energy(0.9)}},
    "other period": {"trp": {"every": 4}},
    "other nuclear weight": {"trp": {"nuclear": 0.0}},
    "other cadence": {"trp": {"nuclear_cadence": "projection"}},
    "ranks that stay": {"trp": {"freeze": 100}},
    "other multiples": {"trp": {"round_to": 2}},
    "other batch": {"batches": {"size": 32}},
    "other order": {"batches": {"seed": 1}},
    "as many other images": {"batches": {"images": 1}},
    "other start": {"identity": {"start": "another.pt"}},
}


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER)
def test_checkpoint_of_another_config_is_refused(checkpoint: Path, other: dict) -> None:
    model = network()
    settings = {"config": replace(CONFIG, epochs=1), "trp": {}, "batches": {}, **other}
    trp = None if settings["trp"] is None else pruning(model, **settings["trp"])
    data = batches(**settings["batches"])
    with pytest.raises(rp.CheckpointError, match=r"c\.pt.*another config: \w+.* there, .* here\. Delete it"):
        train(model, data, settings["config"], trp=trp, checkpoint=checkpoint, identity=settings.get("identity"))
    exactly_same(model, network())


def test_what_differs_from_a_checkpoint_is_named_alone(checkpoint: Path) -> None:
    model = network()
    with pytest.raises(rp.CheckpointError, match=r"another config: training\.lr is 0\.05 there, 0\.1 here\. Delete"):
        train(model, batches(), replace(CONFIG, epochs=1, lr=0.1), trp=pruning(model), checkpoint=checkpoint)


def test_going_on_in_another_precision_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(epochs: int, native: bool) -> None:
        monkeypatch.setattr("rankprune.recipes.training.has_native_bfloat16", lambda device: native)
        stop = kill_in_epoch(1) if epochs == 1 else None
        train(network(), batches(), replace(CONFIG, precision="auto"), checkpoint=tmp_path / "c.pt", on_step=stop)

    with pytest.raises(KilledError):
        run(1, native=False)
    with pytest.warns(UserWarning, match="began in float32 and goes on in bfloat16"):
        run(3, native=True)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", {"conv.weight": torch.zeros(2)}, [1, 2]], ids=str)
def test_damaged_or_foreign_checkpoint(tmp_path: Path, content: object) -> None:
    if isinstance(content, bytes):
        (tmp_path / "c.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "c.pt")
    with pytest.raises(rp.CheckpointError, match=r"c\.pt"):
        train(network(), batches(), CONFIG, checkpoint=tmp_path / "c.pt")
