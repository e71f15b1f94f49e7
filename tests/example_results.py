"""Results of runs of a network of two convolutions: dense, trained at low rank with two seeds, decomposed, and an old file."""

import json
from typing import Any

import torch
from torch import nn

import rankprune as rp
from rankprune.projection import planned_spectra

WICKED = """<script>alert('x')</script> & "quoted" ]]> | [/b] {{ 1 }}"""
"""A text that harms whatever does not escape it."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(24 * 4, 64), nn.Linear(64, 10)
    )


def dense(name: str, top1: float, **more: Any) -> dict[str, Any]:
    """The result of a network that stays dense."""
    costs = {"macs": 1000, "params": 100, "ms_dense": 10.0, "ms": 10.0, "ms_batch": 64, "ms_spread": 0.05}
    return example(name, "dense", None, top1_dense=top1, top1_before_decomposition=top1, top1=top1, **costs, **more)


def example(name: str, method: str, scheme: str | None, **more: Any) -> dict[str, Any]:
    """What every result holds."""
    told = {"commit": "0123456789ab", "versions": {"torch": "2.13.0"}, "cpu": "a processor", "threads": 2, "date": "2026-11-21"}
    run = {
        "name": name,
        "model": "net",
        "dataset": "images",
        "method": method,
        "scheme": scheme,
        "test_split": "test",
        "seed": 0,
    }
    config = {"start": "weights.th", "training": {"epochs": 3, "seed": 0}, "trp": {"rule": "Energy(keep=0.98)"}}
    log = [{"epoch": i, "loss": 1.0 / (i + 1), "seconds": 1.0, "ranks": {}} for i in range(3)]
    return {**run, "epochs": 3, "log": log, "config": config, **told, "macs_dense": 1000, "params_dense": 100, **more}


def decomposed(name: str, method: str, scheme: str, top1: float, seed: int = 0) -> dict[str, Any]:
    """The result of a network of low rank, with a plan and spectra as the runner writes them."""
    model = network()
    before, x = network(), torch.zeros(1, 3, 8, 8)
    plan = rp.make_plan(model, x, scheme=scheme, rule=rp.Budget(macs=0.5))  # type: ignore[arg-type]
    rp.project(model, plan)
    run = example(name, method, scheme, seed=seed, top1_dense=90.0, top1_before_decomposition=top1, top1=top1)
    run["log"] = [] if method == "decompose" else run["log"]
    for entry, more in zip(run["log"], (None, 2, 0), strict=False):  # none, then falling to those of the plan
        entry["ranks"] = {} if more is None else {name: rank + more for name, rank in plan.ranks.items()}
    run["epochs"] = len(run["log"])
    run["config"]["training"]["seed"] = seed
    return run | {
        "macs_dense": plan.macs_dense,
        "macs": plan.macs,
        "params_dense": plan.params_dense,
        "params": plan.params,
        "ms_dense": 10.0,
        "ms": 8.0,
        "ms_batch": 64,
        "ms_spread": 0.05,
        "ranks": plan.ranks,
        "plan": json.loads(plan.to_json()),
        "spectra": {"before": planned_spectra(before, plan), "after": planned_spectra(model, plan)},
    }


def every_kind_of_run() -> list[dict[str, Any]]:
    """One result of each kind that a report may meet."""
    old = decomposed("old", "trp", "channel", 70.0)
    for key in ("plan", "spectra", "ms", "ms_dense", "ms_batch", "ms_spread", "top1_dense"):
        del old[key]
    wicked = decomposed(WICKED, "ours", "spatial", 85.0)
    wicked["plan"]["layers"][-1] |= {"reason": WICKED, "name": f"{WICKED} layer"}
    wicked["config"] |= {"start": None, "note": WICKED}
    return [
        dense("dense", 90.0),
        decomposed("trained", "trp", "spatial", 88.0),
        decomposed("trained-seed1", "trp", "spatial", 89.0, seed=1),
        decomposed("plain", "decompose", "channel", 40.0),
        old,
        wicked,
        dense("other", 70.0, model="other net"),
    ]


def result(method: str, top1: float, seed: int = 0, **more: object) -> dict:
    """The few fields that a table needs, of made-up figures."""
    base = {"name": f"{method}{seed}", "model": "resnet20", "dataset": "cifar10", "method": method, "scheme": "spatial"}
    base |= {
        "epochs": 10,
        "seed": seed,
        "test_split": "test",
        "config": {"start": "a"},
        "macs_dense": 1000,
        "params_dense": 100,
    }
    if method == "dense":
        same = {"macs": 1000, "params": 100, "top1_dense": top1, "top1_before_decomposition": top1, "top1": top1}
        return {**base, **same, "scheme": None, **more}
    costs = {"macs": 400, "params": 50, "ms_dense": 10.0, "ms": 5.0, "ranks": {}}
    return {**base, **costs, "top1_dense": 90.0, "top1_before_decomposition": top1, "top1": top1, **more}
