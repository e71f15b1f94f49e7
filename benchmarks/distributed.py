"""What a projection costs each of P processes, in MACs and received bytes, against the formulas in docs/distributed.md.

ResNet-18 under TRP on random gradients, replicated as DDP does; the second projection is measured. Without torchrun around it,
the script starts itself with 1, 2 and 4 processes and writes the JSON.

    python benchmarks/distributed.py
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import rankprune as rp
from rankprune.linalg import worth_starting
from rankprune.recipes.imagenet_resnet import resnet18
from rankprune.recipes.record import provenance, write

RESULT = Path(__file__).parent / "results" / "distributed.json"
SEED, PROCESSES, SIZE = 0, (1, 2, 4), 112
RULE, SCHEME, NUCLEAR = rp.Budget(macs=0.4), "spatial", 1e-3


def later_macs(k: int, n: int, rank: int | None) -> float:
    """Matrix products of one layer in a projection after the first; rank None: considered, but left dense."""
    r = k if rank is None else rank
    subgradient = r * k * n
    if rank is not None and worth_starting(torch.empty(1, k, n), rank):
        extra = max(16, rank // 4)
        p = rank + extra
        iteration = 3 * p * k * n + extra * k * n + 2 * k * rank * extra  # two bases, one step, and the new directions
        return iteration + 2 * k * p * p + 2 * n * p * p + k * p * p + rank * k * n + subgradient
    return k * k * n + r * k * n + (0 if rank is None else rank * k * n) + subgradient


def process() -> None:
    """One of the processes: two projections, of which the second is measured and printed by the first process."""
    together = "RANK" in os.environ
    if together:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = resnet18(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.zeros(1, 3, SIZE, SIZE)
    trp = rp.TRP(model, rule=RULE, scheme=SCHEME, every=10**6, nuclear=NUCLEAR, example_inputs=x)
    trp.attach(optimizer)
    factorizer = trp._factorizer
    team = factorizer.team
    received = 0
    broadcast = team._broadcast

    def counting(tensor: torch.Tensor, source: int) -> None:
        nonlocal received
        received += tensor.numel() * tensor.element_size() * (source != team.rank)
        broadcast(tensor, source)

    team._broadcast = counting
    trp.project()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    received, begin = 0, time.perf_counter()
    with FlopCounterMode(display=False) as counter:
        plan = trp.project()
    seconds = time.perf_counter() - begin
    shapes = {name: options[0] for name, options in factorizer.options.items()}
    predicted = 0.0
    for name, option in shapes.items():
        if factorizer.owner[name] == team.rank:
            k = option.full_rank
            weights = option.layer.module.get_parameter("weight").numel()
            predicted += later_macs(k, weights // k, plan.ranks.get(name))
    mine = {
        "macs": counter.get_total_flops() // 2,
        "macs_predicted": round(predicted),
        "bytes": received,
        "seconds": round(seconds, 4),
    }
    everyone: list[Any] = [mine]
    if together:
        everyone = [None] * team.size
        dist.all_gather_object(everyone, mine)
    if team.rank == 0:
        planned = sum(4 * factorizer.layers[name].module.get_parameter("weight").numel() for name in plan.ranks)
        considered = sum(4 * layer.module.get_parameter("weight").numel() for layer in factorizer.layers.values())
        total = (planned + considered) * (team.size - 1)  # weights, and with a nuclear term as much again for all considered
        print("RESULT " + json.dumps({"processes": team.size, "bytes_predicted_in_all": total, "each": everyone}), flush=True)
    if together:
        dist.destroy_process_group()


def start(processes: int) -> dict[str, Any]:
    """Run the script in so many processes."""
    launch: Sequence[str] = [sys.executable, __file__, "process"]
    if processes > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *launch[1:]]
    out = subprocess.run(launch, capture_output=True, text=True, check=True).stdout
    return json.loads(next(line for line in out.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


def main() -> None:
    """Measure with each number of processes, print, and write the JSON."""
    rows = [start(processes) for processes in PROCESSES]
    for row in rows:
        each = row["each"]
        measured = sum(e["bytes"] for e in each)
        print(
            f"{row['processes']} processes: GMACs each {[round(e['macs'] / 1e9, 2) for e in each]}, predicted "
            f"{[round(e['macs_predicted'] / 1e9, 2) for e in each]}; MB received in all {measured / 1e6:.1f}, predicted "
            f"{row['bytes_predicted_in_all'] / 1e6:.1f}; seconds {max(e['seconds'] for e in each):.2f}"
        )
    out = Path(sys.argv[2]) if sys.argv[1:2] == ["--out"] else RESULT
    config = {"network": "resnet18", "size": SIZE, "rule": repr(RULE), "scheme": SCHEME, "nuclear": NUCLEAR}
    result = {"benchmark": "distributed", "config": config, "seed": SEED, "runs": rows, **provenance()}
    print(f"result  {write(result, out)}")


if __name__ == "__main__":
    process() if sys.argv[1:] == ["process"] else main()
