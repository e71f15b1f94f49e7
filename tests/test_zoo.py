"""Networks that people use, decomposed: at full rank they compute the same, at lower ranks they cost less."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from zoo import ZOO, Architecture, difference, outputs, run
from zoo.full_rank import full_rank_plan

DOCS = Path(__file__).parents[1] / "docs"
ROUNDING = 1e-4
"""The largest difference allowed, relative to the largest output."""


@pytest.mark.parametrize("name", [a.name for a in ZOO.values() if a.fast])
def test_a_few_of_the_zoo(name: str, tmp_path: Path) -> None:
    check(ZOO[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [a.name for a in ZOO.values() if not a.fast])
def test_the_rest_of_the_zoo(name: str, tmp_path: Path) -> None:
    check(ZOO[name], tmp_path)


def test_the_table_in_the_docs_has_a_row_for_each() -> None:
    assert list(told()) == list(ZOO), "run benchmarks/models.py"
    pages = [*DOCS.glob("*.md"), DOCS.parent / "README.md"]
    counts = {n for page in pages for n in re.findall(r"(\d+) (?:networks|architectures), (?:from|decomp)", page.read_text())}
    assert counts == {str(len(ZOO))}


def told() -> dict[str, tuple[int, int, int]]:
    """By name what docs/models.md says: the layers decomposed, the dense MACs, and those left at RankFraction(0.25)."""
    lines = (DOCS / "models.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][2:]
    return {row[1]: tuple(int(row[i].split()[0].replace(",", "")) for i in (5, 7, 9)) for row in rows}


def check(architecture: Architecture, folder: Path) -> None:
    """All that is asked of an architecture; each part starts from the same weights and leaves them alone, save the last."""
    pytest.importorskip(architecture.library)
    model = architecture.model()
    before = state(model)
    check_full_rank(architecture, model)
    check_low_rank(architecture, model, rp.Energy(0.9), folder / "energy")
    plan = check_low_rank(architecture, model, rp.RankFraction(0.25), folder / "fraction")
    assert (len(plan.decomposed), plan.macs_dense, plan.macs) == told()[architecture.name], "run benchmarks/models.py"
    assert_equal(state(model), before)
    check_training(architecture, model)


def check_full_rank(architecture: Architecture, model: nn.Module) -> None:
    """Same outputs, same tokens, and what was tied is tied."""
    x = architecture.inputs()
    wanted = run(model, x)
    assert any(t.numel() > 1 and float(t.std()) > 0.01 for t in wanted)
    plan = full_rank_plan(model, x, architecture.scheme, architecture.exclude)
    assert plan.decomposed
    small = rp.decompose(model, plan)
    assert difference(run(small, x), wanted) < ROUNDING
    assert bool(ties(model, model)) == architecture.tied
    assert ties(small, model) == ties(model, model)
    if architecture.generates:
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        assert torch.equal(small.generate(**x, **options), model.generate(**x, **options))


def check_low_rank(architecture: Architecture, model: nn.Module, rule: rp.Energy | rp.RankFraction, folder: Path) -> rp.Plan:
    """Fewer MACs, a reason for each layer left alone, and files that give plan and network back."""
    x = architecture.inputs()
    plan = rp.make_plan(model, x, scheme=architecture.scheme, rule=rule, exclude=architecture.exclude)
    assert plan.decomposed
    assert all(plan.skipped.values())
    assert rp.Plan.from_json(plan.to_json()) == plan
    small = rp.decompose(model, plan)
    assert rp.count(small, x).macs == plan.macs
    assert plan.macs < plan.macs_dense
    rp.save(folder, small, plan)
    torch.manual_seed(1)
    loaded = rp.load(folder, architecture.build().eval())  # one that has never run: some keep what they computed from weights
    assert difference(run(loaded, x), run(small, x)) == 0
    assert ties(loaded, model) == ties(small, model)
    return plan


def check_training(architecture: Architecture, model: nn.Module) -> None:
    """One step under TRP; what finalize then returns computes what the projected network does."""
    x = architecture.inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rule, scheme, exclude = rp.RankFraction(0.25), architecture.scheme, architecture.exclude
    trp = rp.TRP(model, scheme=scheme, rule=rule, exclude=exclude, every=1, example_inputs=x).attach(optimizer)
    loss = sum(t.square().mean() for t in outputs(model.train(), x) if t.requires_grad)
    loss.backward()
    optimizer.step()
    small = trp.finalize().eval()
    assert difference(run(small, x), run(model.eval(), x)) < ROUNDING


def ties(model: nn.Module, dense: nn.Module) -> set[tuple[str, ...]]:
    """The names of the modules that share a parameter; the two layers in the place of one of `dense` go by its name."""
    leaves = {name for name, module in dense.named_modules(remove_duplicate=False) if not any(module.children())}
    holders: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holder = name.rpartition(".")[0]
        outer = holder.rpartition(".")[0]
        holders[id(parameter)].append(outer if outer in leaves else holder)
    return {tuple(group) for group in holders.values() if len(group) > 1}


def state(model: nn.Module) -> dict[str, Any]:
    """All of a network that must be left alone, copied."""
    modules = dict(model.named_modules())
    kinds = {f"{name}: {type(m).__name__}": (m.training, len(m._forward_hooks)) for name, m in modules.items()}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()} | kinds


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value, name
