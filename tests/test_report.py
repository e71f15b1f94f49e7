import json
from pathlib import Path

import pytest
from torch import nn

import rankprune as rp
from rankprune.projection import planned_spectra
from rankprune.report.plots import plot_results, plot_training
from rankprune.report.tables import BEGIN, END, markdown_table, read_results, replace_between_marks

ROOT = Path(__file__).parent.parent


def result(method: str, top1: float, seed: int = 0, **more: object) -> dict:
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
        return {**base, "scheme": None, "top1_dense": top1, **more}
    costs = {"macs": 400, "params": 50, "ms_dense": 10.0, "ms": 5.0}
    return {**base, **costs, "top1_dense": 90.0, "top1_before_decomposition": top1, "top1": top1, **more}


def test_rows_hold_mean_spread_drop_and_ratios():
    table = markdown_table([result("trp", 88.0), result("trp", 89.0, seed=1), result("dense", 90.0)])
    dense, trp = table.splitlines()[2:]
    assert dense.startswith("| resnet20 | dense |")
    assert "| 90.00 |" in dense
    assert "| 88.50 ± 0.71 | 1.50 ± 0.71 | 400 | 2.50x | 50 | 2.00x | 5.0 | 2.00x |" in trp


def test_a_row_without_a_reference_has_no_drop():
    alone = result("trp", 88.0)
    del alone["top1_dense"]
    assert "| 88.00 |  | 400 |" in markdown_table([alone])


def test_rows_differ_by_what_they_had_help_from():
    taught = {"start": "a", "training": {"distill": 0.7, "seed": 3}}
    table = markdown_table([result("ours", 88.0, config={"start": "a"}), result("ours", 89.0, config=taught)])
    assert [row.split(" | ")[1] for row in table.splitlines()[2:]] == ["ours", "ours distilled"]
    assert "ours from scratch" in markdown_table([result("ours", 80.0, config={})])


def test_pictures_of_results(tmp_path):
    spectra = {"before": {"a": [1.0, 0.5]}, "after": {"a": [1.0, 0.0]}}
    log = [{"epoch": 0, "ranks": {}}, {"epoch": 1, "ranks": {"a": 1}}]
    results = [result("dense", 90.0), result("trp", 88.0, spectra=spectra, log=log), result("decompose", 60.0, macs=500)]
    files = plot_results(tmp_path, results)
    assert [file.name for file in files] == ["accuracy.svg", "trp0.svg"]
    drawn = [file.read_text() for file in files]
    assert all(text.startswith("<?xml") and len(text) > 5000 for text in drawn)
    assert drawn == [file.read_text() for file in plot_results(tmp_path, results)], "the same results draw the same file"


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
    before, after = planned_spectra(model, plan), planned_spectra(trained, plan)
    plot_training(tmp_path / "spectra.png", before, after, [(1, {"0": 5, "1": 6}), (2, plan.ranks)])
    data = (tmp_path / "spectra.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000
