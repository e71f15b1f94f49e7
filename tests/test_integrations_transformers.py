"""The Hugging Face Trainer with TRPCallback ends with the weights of the plain loop."""

import shutil
import warnings
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import own_clock
import rankprune as rp
import toy
from rankprune.integrations.transformers import TRPCallback
from rankprune.latency.cache import LatencyCache


def trainer(folder: Path, model: torch.nn.Module, **settings: Any) -> Trainer:
    defaults = {
        "per_device_train_batch_size": toy.BATCH,
        "num_train_epochs": toy.EPOCHS,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": toy.EVERY,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = TrainingArguments(folder, **{**defaults, **settings})
    return Trainer(model, args, train_dataset=toy.Data(), eval_dataset=toy.Data(), optimizers=(toy.sgd(model), None))


def callback(**more: Any) -> TRPCallback:
    return TRPCallback(**toy.settings(**{"ramp": 0.5, **more}))


CASES = {
    "plain": ({}, {}),
    "clipping": ({"clip": True}, {"max_grad_norm": toy.CLIP}),
    "accumulation": ({"accumulate": 2}, {"gradient_accumulation_steps": 2}),
    "bf16": ({"bf16": True}, {"bf16": True}),
}


@pytest.mark.parametrize(("loop", "settings"), CASES.values(), ids=CASES)
def test_same_weights_as_the_plain_loop(loop: dict, settings: dict, tmp_path: Path) -> None:
    expected, model = toy.plain_loop(**loop), toy.Net()
    runner = trainer(tmp_path, model, **settings)
    trp = callback().attach(runner)
    runner.train()
    toy.same_weights(model, expected.model)
    toy.really_projected(trp.trp, 20 // loop.get("accumulate", 1))
    small, clean = trp.finalize(), toy.Net()  # the trainer leaves its mixed precision around the forward of the trained one
    clean.load_state_dict(model.state_dict())
    toy.finalizes(small, clean)


def test_the_average_of_the_weights_is_that_of_the_plain_loop(tmp_path: Path) -> None:
    class Averaging(TrainerCallback):
        def on_step_end(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
            average.update_parameters(model)

    expected, model = toy.plain_loop(), toy.Net()
    average = toy.moving_average(model)
    runner = trainer(tmp_path, model)
    trp = callback().attach(runner)
    runner.add_callback(Averaging())
    runner.train()
    toy.same_weights(average, expected.average)
    model.load_state_dict(average.module.state_dict())
    toy.finalizes(trp.finalize(), model)


def test_resumed_without_timing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(cache: str, checkpoint: Path | None = None) -> tuple[TRPCallback, toy.Net]:
        monkeypatch.setenv("RANKPRUNE_CACHE", str(tmp_path / cache))
        LatencyCache._remembered.clear()
        model = toy.Net()
        runner = trainer(tmp_path / "run", model, save_strategy="steps", save_steps=6)
        trp = callback(rule=rp.Budget(latency=0.6, backend="timeless"), ramp=toy.EVERY).attach(runner)
        runner.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return trp, model

    own_clock.add(monkeypatch, own_clock.Timeless())
    timings = own_clock.count_timings(monkeypatch)
    whole, model = fit("first")
    assert timings != []
    timings.clear()
    trp, resumed = fit("second", tmp_path / "run" / "checkpoint-6")
    assert timings == []
    assert (trp.trp.steps, trp.trp.history, trp.trp.plan) == (20, whole.trp.history, whole.trp.plan)
    toy.same_weights(resumed, model)


@pytest.mark.parametrize("moved", [False, True])
def test_resumed_is_uninterrupted(tmp_path: Path, moved: bool) -> None:
    def fit(checkpoint: Path | None = None) -> tuple[TRPCallback, toy.Net]:
        model = toy.Net()
        runner = trainer(tmp_path / "run", model, save_strategy="steps", save_steps=6)
        trp = callback(freeze=0.7).attach(runner)
        runner.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return trp, model

    whole, model = fit()
    checkpoint = tmp_path / "run" / "checkpoint-6"
    if moved:
        checkpoint = Path(shutil.move(checkpoint, tmp_path / "elsewhere"))
    trp, resumed = fit(checkpoint)
    toy.same_weights(resumed, model)
    assert (trp.trp.steps, trp.trp.history, trp.trp.plan) == (20, whole.trp.history, whole.trp.plan)
    toy.same_weights(trp.finalize(), whole.finalize())


@pytest.mark.parametrize("bf16", [False, True])
def test_resumed_with_clipping_and_accumulation(tmp_path: Path, bf16: bool) -> None:
    expected = toy.plain_loop(clip=True, accumulate=2, bf16=bf16)
    settings = {"max_grad_norm": toy.CLIP, "gradient_accumulation_steps": 2, "bf16": bf16}
    for checkpoint in (None, str(tmp_path / "checkpoint-6")):
        model = toy.Net()
        runner = trainer(tmp_path, model, save_strategy="steps", save_steps=6, **settings)
        trp = callback().attach(runner)
        runner.train(resume_from_checkpoint=checkpoint)
        toy.same_weights(model, expected.model)
        toy.really_projected(trp.trp, 10)


def test_a_checkpoint_of_dense_training_starts_trp_anew(tmp_path: Path) -> None:
    trainer(tmp_path, toy.Net(), save_strategy="steps", save_steps=12).train()
    runner = trainer(tmp_path, toy.Net())
    trp = callback(ramp=0).attach(runner)
    with pytest.warns(UserWarning, match="no state of TRP"):
        runner.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert [step for step, _ in trp.trp.history] == [4, 8]


def test_a_state_from_before_a_training_without_the_callback_is_left_alone(tmp_path: Path) -> None:
    runner = trainer(tmp_path, toy.Net(), save_strategy="steps", save_steps=6)
    callback().attach(runner)
    runner.train()
    model = toy.Net()
    trainer(tmp_path, model, save_strategy="steps", save_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    values = torch.linalg.svdvals(model.head[0].weight.detach())
    assert values[-1] > 1e-5 * values[0], "it was trained, and not projected"
    runner = trainer(tmp_path, toy.Net())
    trp = callback(ramp=0).attach(runner)
    with pytest.warns(UserWarning, match="or that of another step: TRP starts anew"):
        runner.train(resume_from_checkpoint=str(tmp_path / "checkpoint-18"))
    assert trp.trp.steps == 2


def test_where_optimizers_lose_the_state_it_is_in_that_of_the_trainer(tmp_path: Path) -> None:
    def fit(checkpoint: Path | None = None) -> tuple[TRPCallback, toy.Net]:
        model = toy.Net()
        runner = trainer(tmp_path, model, save_strategy="steps", save_steps=6)
        trp = callback(freeze=0.7, nuclear=0.0).attach(runner)  # whose tensors are then computed anew
        runner.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return trp, model

    whole, model = fit()
    file = tmp_path / "checkpoint-6" / "optimizer.pt"
    saved = torch.load(file, weights_only=True)
    assert saved["param_groups"][0].pop("rankprune")["global_step"] == 6
    torch.save(saved, file)
    resumed, again = fit(tmp_path / "checkpoint-6")
    assert (resumed.trp.steps, resumed.trp.history, resumed.trp.plan) == (20, whole.trp.history, whole.trp.plan)
    toy.same_weights(again, model)


@pytest.mark.parametrize("late", [False, True])
def test_a_callback_that_reporters_come_before_says_so(tmp_path: Path, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = trainer(tmp_path, toy.Net(), max_steps=1)
    monkeypatch.setattr(runner.args, "report_to", ["tensorboard"])
    trp = callback()
    if late:
        runner.add_callback(trp)
        with pytest.warns(UserWarning, match=r"reports to tensorboard before.*attach\(trainer\) instead"):
            runner.train()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trp.attach(runner)
            runner.train()


def test_ranks_costs_and_overhead_reach_the_loggers(tmp_path: Path) -> None:
    runner = trainer(tmp_path, toy.Net(), report_to=["tensorboard"])
    trp = callback().attach(runner)
    runner.train()
    board = {tag.removeprefix("train/"): values for tag, values in toy.scalars(tmp_path).items()}
    toy.good_metrics(board, trp.trp.history)
    rows = [row for row in runner.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20]
    toy.good_metrics({tag: [row[tag] for row in rows] for tag in rows[0]}, trp.trp.history)


@pytest.mark.parametrize("reporters", [[], ["tensorboard"]])
def test_among_the_trainers_callbacks(tmp_path: Path, reporters: list[str]) -> None:
    expected, model, trp = toy.plain_loop(), toy.Net(), callback()
    args = trainer(tmp_path, model, report_to=reporters).args
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner = Trainer(model, args, train_dataset=toy.Data(), optimizers=(toy.sgd(model), None), callbacks=[trp])
    assert any("metrics will not be there" in str(w.message) for w in caught) == bool(reporters)
    runner.train()
    toy.same_weights(model, expected.model)
    assert "rankprune/params" in runner.state.log_history[0]


def test_two_parts_have_a_callback_each(tmp_path: Path) -> None:
    def fit(checkpoint: Path | None = None, **names: str) -> tuple[TRPCallback, TRPCallback, toy.Net, Trainer]:
        model = toy.Net()
        runner = trainer(tmp_path / "run", model, save_strategy="steps", save_steps=6)
        features = callback(include=["features.*"], **{"name": "features"} | names).attach(runner)
        head = callback(include=["head.*"], **{"name": "head"} | names).attach(runner)
        runner.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return features, head, model, runner

    *whole, expected, _ = fit()
    *resumed, model, runner = fit(tmp_path / "run" / "checkpoint-6")
    toy.same_weights(model, expected)
    for trp, uninterrupted in zip(resumed, whole, strict=True):
        assert trp.trp.history == uninterrupted.trp.history != []
    assert {"features/rankprune/macs", "head/rankprune/macs"} <= runner.state.log_history[-2].keys()
    with pytest.raises(rp.RankPruneError, match="a TRPCallback named 'both' already"):
        fit(name="both")
    both = [callback(include=["features.*"]), callback(include=["head.*"])]
    runner = trainer(tmp_path / "run", toy.Net(), save_strategy="steps", save_steps=6)
    runner.callback_handler.callbacks += both
    with pytest.raises(rp.RankPruneError, match="two callbacks are named ''"):
        runner.train()


def test_a_best_checkpoint_from_within_the_ramp_is_told_of(tmp_path: Path) -> None:
    often = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 4}
    for best, ramp in ((4, 0.5), (20, 0.5), (4, 0.1)):
        runner = trainer(
            tmp_path, toy.Net(), **often, load_best_model_at_end=True, metric_for_best_model="closeness", greater_is_better=True
        )
        runner.evaluate = lambda *_, best=best, runner=runner, **__: {"eval_closeness": -abs(runner.state.global_step - best)}
        trp = callback(ramp=ramp).attach(runner)
        runner.train()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trp.finalize()
        told = [str(w.message) for w in told if "before the ramp did" in str(w.message)]
        assert len(told) == (best < trp.trp.schedule.ramp), (best, ramp)


@pytest.mark.filterwarnings("ignore:.*before the ramp did")
@pytest.mark.parametrize("best", [6, 12])  # within the ramp of 8 or not; the latter right after a projection
def test_the_best_checkpoint_brings_its_state_along(tmp_path: Path, best: int) -> None:
    def fit(stop: int, **settings: Any) -> tuple[TRPCallback, Trainer]:
        runner = trainer(tmp_path / str(stop), toy.Net(), **settings)
        trp = callback(rule=rp.Energy(0.9), ramp=8).attach(runner)
        runner.evaluate = lambda *_, **__: {"eval_closeness": -abs(runner.state.global_step - best)}
        runner.train()
        return trp, runner

    often = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 6, "save_steps": 6}
    choosing = {"load_best_model_at_end": True, "metric_for_best_model": "closeness", "greater_is_better": True}
    chosen, _ = fit(20, **often, **choosing)
    ended, _ = fit(best, max_steps=best)
    assert (chosen.trp.steps, chosen.trp.history) == (best, ended.trp.history)
    toy.same_weights(chosen.finalize(), ended.finalize())


def test_a_best_checkpoint_that_was_not_saved_changes_nothing(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 8}
    choosing = {"load_best_model_at_end": True, "metric_for_best_model": "closeness", "greater_is_better": True}
    runner = trainer(tmp_path, toy.Net(), **settings, **choosing)
    runner.evaluate = lambda *_, **__: {"eval_closeness": -abs(runner.state.global_step - 4)}
    trp = callback(rule=rp.Energy(0.9)).attach(runner)
    runner.train()
    assert trp.trp.steps == 20


@pytest.mark.parametrize("trainings", [1, 2])
def test_a_forward_of_the_users_stays_under_mixed_precision(tmp_path: Path, trainings: int) -> None:
    def doubled(self: toy.Net, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        return toy.Net.forward(self, 2 * x, labels)

    model = toy.Net()
    model.forward = MethodType(doubled, model)
    runner = trainer(tmp_path, model, bf16=True)
    trp = callback().attach(runner)
    for _ in range(trainings):
        runner.train()
    clean = toy.Net()
    clean.load_state_dict(model.state_dict())
    clean.forward = MethodType(doubled, clean)
    toy.finalizes(trp.finalize(), clean)


def test_mixed_precision_is_taken_off_however_often_it_was_put_on(tmp_path: Path) -> None:
    model, clean = toy.Net(), toy.Net()
    runner = trainer(tmp_path, model, bf16=True)
    trp = callback().attach(runner)
    runner.train()
    runner.train()
    small = trp.finalize()
    assert "forward" not in vars(small)
    clean.load_state_dict(model.state_dict())
    toy.finalizes(small, clean)


def test_another_training_starts_anew_and_leaves_nothing_behind(tmp_path: Path) -> None:
    runner = trainer(tmp_path, toy.Net())
    trp = callback().attach(runner)
    runner.train()
    first = trp.trp
    runner.train()
    assert trp.trp is not first
    assert (first.steps, trp.trp.steps) == (20, 20)
    raw = runner.optimizer.optimizer
    raw.step()
    assert trp.trp.steps == 20
    assert "rankprune" not in raw.state_dict()["param_groups"][0]
    rp.TRP(runner.model, rule=rp.Energy(0.9)).attach(raw)


def test_a_transformer(tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=16))
    rows = [{"input_ids": torch.randint(50, (8,)), "labels": i % 2} for i in range(32)]
    args = TrainingArguments(tmp_path, max_steps=10, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no")
    runner = Trainer(model, args, train_dataset=rows)
    x = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    trp = TRPCallback(rule=rp.Budget(macs=0.5), every=2, ramp=0.5, example_inputs=x).attach(runner)
    runner.train()
    small = trp.finalize()
    assert rp.count(small, x).macs <= 0.5 * rp.count(model, x).macs
    with torch.no_grad():
        assert torch.allclose(small.eval()(**x).logits, model.eval()(**x).logits, atol=1e-5)
