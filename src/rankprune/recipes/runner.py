"""Run an experiment: one network trained and decomposed, one JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankprune.checkpoint import load, save
from rankprune.comparison import compare
from rankprune.cost import count
from rankprune.decompose import decompose
from rankprune.distributed import Team
from rankprune.errors import RankPruneError
from rankprune.files import draft_of
from rankprune.latency import Setting
from rankprune.plan import Plan
from rankprune.planner import make_plan
from rankprune.projection import planned_spectra, project
from rankprune.recipes.data import Data, load_data
from rankprune.recipes.evaluation import top1
from rankprune.recipes.experiment import Experiment, Folders
from rankprune.recipes.networks import CHECKPOINT, WEIGHTS, build, load_weights, weights_file
from rankprune.recipes.objective import Committee
from rankprune.recipes.processes import Processes
from rankprune.recipes.progress import EpochLog, Progress
from rankprune.recipes.record import in_short, provenance, settings_of, top1_of_a_run
from rankprune.recipes.training import train
from rankprune.rules import parse_rule
from rankprune.state_dicts import read_notes, save_tensors
from rankprune.trp import TRP

TIMED = 64
"""Images in the batch that networks are timed on; where the rule goes by latency, it is the batch that it timed."""


def run(
    experiment: Experiment,
    folders: Folders,
    on_step: Callable[[Progress], None] | None = None,
    processes: Processes | None = None,
) -> dict[str, Any] | None:
    """Run an experiment, or what is left of it, and return its result, ready for JSON.

    The run's folder gets dense.safetensors (the weights before decomposition), the artefact, and the checkpoint. All figures
    of the decomposed network are those of the artefact loaded again. Of several processes, which train together and must
    all see the folder, the first one does the rest alone, and the others return None.

    Raises:
        RankPruneError: for missing data or weights, and for whatever a bad config leads to.
    """
    e, folder = experiment, folders.runs / experiment.name
    processes = processes or Processes()
    checkpoint, begun = folder / CHECKPOINT, provenance(processes.size)
    if e.method == "decompose":
        if checkpoint.is_file():
            raise RankPruneError(f"{str(folder)!r} has the checkpoint of a training; take another folder")
        processes.part_ways()  # there is nothing to train together
        if not processes.first:
            return None
    _check_held_out(e, folders)
    torch.manual_seed(e.training.seed)
    data = load_data(e, folders.data, processes)
    if processes.first:
        folder.mkdir(parents=True, exist_ok=True)  # what cannot be written shows before the training

    def network(weights: str | None = None, architecture: str = e.model) -> nn.Module:
        made = build(architecture, data.classes)
        if weights:
            load_weights(made, weights, folders.models, folders.runs)
        return made.to(processes.device)

    model = network(e.start)
    teachers = [network(source, e.teacher_model or e.model) for source in e.teachers]
    teacher = Committee(teachers) if len(teachers) > 1 else next(iter(teachers), None)
    result = _describe(e, data) | begun
    known = top1_of_a_run(e.reference, folders, result) if e.reference else None
    reference = network(e.reference) if e.reference and known is None else None  # missed before the training, if missing
    x = next(data.test(batch=1))[0]
    together = next(data.test(batch=e.trp.batch or 1))[0]
    log, plan, small, found = _train(e, model, teacher, data, together, checkpoint, on_step, in_short(begun))
    processes.part_ways()
    if not processes.first:
        return None
    with draft_of(folder / WEIGHTS) as weights:  # takes its place last: a run that has it has been judged
        notes = {"dataset": e.dataset, "holdout": str(e.holdout), "settings": json.dumps(settings_of(e))}
        save_tensors(weights, model, notes)
        result |= {"wall_s": round(sum(entry.seconds for entry in log), 1), "log": [asdict(entry) for entry in log], **found}
        if plan is None or small is None:
            result |= _compare(model, model, data, x, e)
            result["top1_dense"] = result["top1"]
        else:
            if e.reference:
                result["top1_dense"] = known if reference is None else top1(reference, data.test())
            save(folder / "artefact", small, plan)
            small = load(folder / "artefact", network())
            result |= _compare(model, small, data, x, e)
            if not e.reference and e.method.startswith("decompose"):
                result["top1_dense"] = result["top1_before_decomposition"]
            result |= {"ranks": plan.ranks, "plan": json.loads(plan.to_json())}
            torch.manual_seed(e.training.seed)  # a fresh network is again the one that was trained
            before = _rounded_spectra(network(e.start), plan)
            project(model, plan)  # what was only decomposed is not of low rank yet
            result["spectra"] = {"before": before, "after": _rounded_spectra(model, plan)}
    return result


def _train(
    e: Experiment,
    model: nn.Module,
    teacher: nn.Module | None,
    data: Data,
    x: torch.Tensor,
    checkpoint: Path,
    on_step: Callable[[Progress], None] | None,
    by: str,
) -> tuple[list[EpochLog], Plan | None, nn.Module | None, dict[str, Any]]:
    """Do what the method says: the log of the training, plan and decomposed network if there is one, and what to report."""
    rule, scheme = parse_rule(e.trp.rule), e.trp.scheme
    names = ("model", "dataset", "method", "start", "teacher", "teacher_model", "holdout")
    identity = {name: getattr(e, name) for name in names} | {"source": data.source}
    if e.method.startswith("decompose"):
        identity |= {"rule": repr(rule), "scheme": scheme}
    learn = partial(
        train,
        batches=data.batches,
        config=e.training,
        teacher=teacher,
        checkpoint=checkpoint,
        on_step=on_step,
        identity=identity,
        by=by,
    )
    if e.method == "dense":
        return learn(model), None, None, {}
    if e.method.startswith("decompose"):

        def plan_now() -> Plan:
            return make_plan(model, x, scheme=scheme, rule=rule)

        plan = plan_now() if e.method == "decompose" else _plan_once(checkpoint, plan_now)
        small = decompose(model, plan)
        if e.method == "decompose":
            return [], plan, small, {}
        found = {"top1_before_finetuning": top1(small, data.test())}
        return learn(small), plan, small, found
    steps = e.training.epochs * len(data.batches)
    trp = TRP(
        model,
        rule=rule,
        scheme=scheme,
        every=e.trp.every,
        nuclear=e.trp.nuclear,
        nuclear_cadence=e.trp.nuclear_cadence,
        ramp=round(e.trp.ramp * steps),
        freeze=None if e.trp.freeze is None else round(e.trp.freeze * steps),
        example_inputs=x,
    )
    log = learn(model, trp=trp)
    small = trp.finalize()
    return log, trp.plan, small, {}


def _plan_once(checkpoint: Path, make: Callable[[], Plan]) -> Plan:
    """The plan of the training that the checkpoint is of, or else a new one: the first process's, for all."""
    team, kept = Team(), checkpoint.with_name("plan.json")

    def plan() -> dict[str, Plan]:
        if checkpoint.is_file() and kept.is_file():
            return {"plan": Plan.load(kept)}
        made = make()
        kept.parent.mkdir(parents=True, exist_ok=True)
        made.save(kept)
        return {"plan": made}

    return team.share(lambda: plan() if team.rank == 0 else {})["plan"]


def _check_held_out(e: Experiment, folders: Folders) -> None:
    """Make sure that nothing that this run builds on was trained, by us, on images that are held out here."""
    for source in (e.start, *e.teachers, e.reference):
        if e.holdout and source and (file := weights_file(source, folders.models, folders.runs)):
            notes = read_notes(file)
            if notes.get("dataset") == e.dataset and int(notes.get("holdout", e.holdout)) < e.holdout:
                raise RankPruneError(
                    f"{source!r} held out {notes['holdout']} training images, this run {e.holdout}: it has seen images that "
                    "are tested on here; run that experiment with the same holdout first"
                )


def _compare(model: nn.Module, small: nn.Module, data: Data, x: torch.Tensor, e: Experiment) -> dict[str, Any]:
    """Accuracy, costs and times of a network before and after decomposition; of one that stays dense both are the same."""
    rule = parse_rule(e.trp.rule)
    batch = next(data.test(batch=(e.trp.batch or 1) if rule.metric == "latency" else TIMED))[0]
    before, after = count(model, x), count(small, x)
    networks = {"small": small} if model is small else {"dense": model, "small": small}
    found = compare(networks, batch, [rule.backend], threads=rule.threads, rounds=30)
    if found.failed:
        raise RankPruneError(f"the networks cannot be timed: {found.failed[rule.backend]}")
    times = {t.network: t for t in found.timings}
    accuracy = top1(small, data.test())
    return {
        "top1_before_decomposition": accuracy if model is small else top1(model, data.test()),
        "top1": accuracy,
        "macs_dense": before.macs,
        "macs": after.macs,
        "params_dense": before.params,
        "params": after.params,
        "ms_dense": round(times.get("dense", times["small"]).ms, 3),
        "ms": round(times["small"].ms, 3),
        "ms_backend": rule.backend,
        "ms_threads": times["small"].threads,
        "ms_device": Setting.of(small, rule.backend, rule.threads).cpu,
        "ms_batch": len(batch),
        "ms_spread": round(max(t.spread for t in times.values()), 3),
    }


def _rounded_spectra(model: nn.Module, plan: Plan) -> dict[str, list[float]]:
    return {name: [float(f"{v:.3g}") for v in values] for name, values in planned_spectra(model, plan).items()}


def _describe(e: Experiment, data: Data) -> dict[str, Any]:
    return {
        "name": e.name,
        "model": e.model,
        "dataset": e.dataset,
        "method": e.method,
        "scheme": None if e.method == "dense" else e.trp.scheme,
        "epochs": e.training.epochs if e.method != "decompose" else 0,
        "seed": e.training.seed,
        "train_images": data.train_images,
        "test_images": data.test_images,
        "test_split": "holdout" if e.holdout else "test",
        "source": data.source,
        "test_digest": data.test_digest,
        "config": asdict(e),
    }
