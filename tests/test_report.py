import json
from pathlib import Path

import pytest
from torch import nn

import rankprune as rp
from rankprune.report.plots import plot_training
from rankprune.report.tables import BEGIN, END, markdown_table, read_results, replace_between_marks

ROOT = Path(__file__).parent.parent


def result(method: str, top1: float, seed: int = 0, **more: object) -> dict:
    base = {"name": f"{method}{seed}", "model": "resnet20", "dataset": "cifar10", "method": method, "scheme": "spatial"}
    base |= {"epochs": 10, "seed": seed, "test_split": "test", "config": {}, "macs_dense": 1000, "params_dense": 100}
    if method == "dense":
        return {**base, "scheme": None, "top1_dense": top1, **more}
    costs = {"macs": 400, "params": 50, "ms_dense": 10.0, "ms": 5.0}
    return {**base, **costs, "top1_before_decomposition": 90.0, "top1": top1, **more}


def test_rows_hold_mean_spread_drop_and_ratios():
    table = markdown_table([result("trp", 88.0), result("trp", 89.0, seed=1), result("dense", 90.0)])
    dense, trp = table.splitlines()[2:]
    assert dense.startswith("| resnet20 | dense |")
    assert "| 90.00 |" in dense
    assert "| 88.50 ± 0.71 | 1.50 ± 0.71 | 400 | 2.50x | 50 | 2.00x | 5.0 | 2.00x |" in trp


def test_a_drop_is_taken_only_from_dense_rows_of_equal_training():
    table = markdown_table([result("trp", 88.0), result("dense", 95.0, epochs=20)])
    assert "| 88.00 |  | 400 |" in table


def test_plain_decomposition_drops_from_the_network_it_decomposed():
    assert "| 60.00 | 30.00 |" in markdown_table([result("decompose", 60.0), result("dense", 95.0)])


def test_results_are_read_in_order_and_other_files_left_alone(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps(result("trp", 1.0)))
    (tmp_path / "a.json").write_text(json.dumps(result("dense", 2.0)))
    (tmp_path / "c.json").write_text("{}")
    assert [r["method"] for r in read_results(tmp_path)] == ["dense", "trp"]


@pytest.mark.parametrize("content", [None, "{"])
def test_no_results_or_a_broken_one_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(rp.RankPruneError, match=r"results of experiments|is not JSON"):
        read_results(tmp_path)


def test_only_what_stands_between_the_marks_is_replaced():
    assert replace_between_marks(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(rp.RankPruneError, match="lacks the lines"):
        replace_between_marks("nothing", "new")


def test_the_readme_shows_the_table_of_the_committed_results():
    table = markdown_table(read_results(ROOT / "benchmarks" / "results"))
    assert f"{BEGIN}\n{table}\n{END}" in (ROOT / "README.md").read_text(), "run: rankprune report --into README.md"


def test_committed_results_say_how_they_came_about():
    for r in read_results(ROOT / "benchmarks" / "results"):
        assert {"config", "seed", "commit", "versions", "cpu", "date", "wall_s", "epochs"} <= set(r)
        assert r["commit"], "a result comes from a commit"
        assert not r["commit"].endswith("+"), "a result comes from files as committed"


def test_a_picture_is_drawn(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    plan = rp.make_plan(model, rule=rp.FixedRank(3))
    trained = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    rp.project(trained, plan)
    plot_training(tmp_path / "spectra.png", plan, model, trained, [(1, {"0": 5, "1": 6}), (2, plan.ranks)])
    data = (tmp_path / "spectra.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000
