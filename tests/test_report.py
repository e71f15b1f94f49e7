import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rankprune as rp
from example_results import WICKED, decomposed, every_kind_of_run, result
from rankprune.cli.app import app
from rankprune.projection import planned_spectra
from rankprune.report import tables as report_tables
from rankprune.report.axes import Axis, axis_of, tick_label, tick_labels
from rankprune.report.markdown import BEGIN, END, markdown, markdown_table, replace_between_marks, under_names
from rankprune.report.names import told_apart
from rankprune.report.plots import plot_accuracy
from rankprune.report.results import machine, read_results
from rankprune.report.tables import Table, config, latency, ranks_over_training, ranks_together, run_tables, tables

ROOT = Path(__file__).parent.parent


def overview(results: list[dict]) -> Table:
    """That of results of one network on the same images."""
    (table,) = report_tables.overview(results)
    return table


def test_rows_hold_mean_spread_drop_and_ratios():
    table = markdown_table(overview([result("trp", 88.0), result("trp", 89.0, seed=1), result("dense", 90.0)]))
    dense, trp = table.splitlines()[2:]
    assert dense.startswith("| dense |")
    assert "| 90.00 |" in dense
    assert "| 88.50 ± 0.71 | 1.50 ± 0.71 | 400 | 2.50x | 50 | 2.00x | 5.0 | 2.00x |" in trp


def test_seeds_have_their_costs_averaged_too():
    costs = [{"macs": 400, "params": 50, "ms": 5.0}, {"macs": 200, "params": 30, "ms": 3.0}]
    table = markdown_table(overview([result("trp", 88.0, seed, **cost) for seed, cost in enumerate(costs)]))
    assert "| 88.00 ± 0.00 | 2.00 ± 0.00 | 300 | 3.33x | 40 | 2.50x | 4.0 | 2.50x |" in table


def test_times_of_several_machines_are_neither_averaged_nor_taken_for_one():
    machines = [{"cpu": "one", "threads": 2}, {"cpu": "two", "threads": 1}, {"cpu": "one", "threads": 2}]
    seeds = [result("trp", 88.0, i, ms=ms, **m) for i, (ms, m) in enumerate(zip((4.0, 9.0, 6.0), machines, strict=True))]
    table = overview([*seeds, result("ours", 89.0, **machines[1])])
    assert {row[0]: row[-2:] for row in table.rows} == {"trp": ("5.0 (B)", "2.00x"), "ours": ("5.0 (A)", "2.00x")}
    assert table.note.endswith("ms: A on two, 1 thread; B on one, 2 threads.")
    assert overview(seeds).rows[0][-2:] == ("5.0", "2.00x")
    untimed = {k: v for k, v in result("trp", 88.0, 3).items() if k not in ("ms", "ms_dense")}
    assert overview([untimed, *seeds]).rows[0][-2:] == ("5.0", "2.00x"), "by the seeds that are timed"


def test_what_is_fine_tuned_says_from_where():
    table = overview([result("decompose+finetune", 88.0 + seed, seed, top1_before_finetuning=60.0 + seed) for seed in (0, 2)])
    assert table.rows[0][3] == "89.00 ± 1.41 (from 61.00 ± 1.41)"
    assert "From: before fine-tuning." in table.note
    assert "From" not in overview([result("trp", 88.0)]).note


def test_who_trained_which_epochs_is_told():
    log = [{"by": "a, cpu"}, {"by": "a, cpu"}, {"by": "b, cpu"}, {}]
    assert ("trained by", "a, cpu; b, cpu") in config(result("trp", 88.0, log=log)).rows


def test_a_training_that_decomposed_nothing_says_so():
    bare = {**decomposed("a", "trp", "channel", 88.0), "ranks": {}, "spectra": {"before": {}, "after": {}}}
    bare["log"] = [{**entry, "ranks": {}} for entry in bare["log"]]
    notes = {table.title: table.note for table in run_tables(bare) if not table.rows}
    assert notes["Ranks over training"] == notes["Spectra"] == "No layer was decomposed."


def test_the_time_that_training_waited_for_images_is_told():
    log = [{"seconds": 30.0, "input_share": 0.1}, {"seconds": 10.0, "input_share": 0.5}, {"seconds": 5.0, "input_share": None}]
    assert ("waited for input", "20.0% of the time") in config(result("trp", 88.0, log=log)).rows
    assert "waited" not in str(config(result("trp", 88.0, log=log[2:])).rows)
    at_once = [{"seconds": 0.0, "input_share": 0.0}]
    assert ("waited for input", "0.0% of the time") in config(result("trp", 88.0, log=at_once)).rows


def test_other_images_are_told_and_drawn_apart(tmp_path):
    results = [result("trp", 88.0), result("trp", 60.0, dataset="other"), result("trp", 70.0, test_split="holdout")]
    each = report_tables.overview(results)
    assert [table.title for table in each] == [f"resnet20 on {images}" for images in ("cifar10", "cifar10, holdout", "other")]
    assert [bool(table.note) for table in each] == [False, False, True]
    assert under_names(each).count("**resnet20 on ") == 3
    assert "**" not in under_names(each[:1])
    plot_accuracy(tmp_path / "a.svg", results)
    assert (tmp_path / "a.svg").read_text().count("<!-- share of MACs left -->") == 3


def test_times_on_the_processor_do_not_pass_for_those_of_the_gpu_beside_it():
    timed = {"gpu": "H200", "cpu": "EPYC", "ms_threads": 2}
    assert machine(result("ours", 88.0, **timed)) == "H200, EPYC, 2 threads"
    assert machine(result("ours", 88.0, **timed, ms_device="H200")) == "H200, EPYC, 2 threads"
    assert machine(result("ours", 88.0, **timed, ms_device="EPYC")) == "EPYC, 2 threads"


def test_shorter_trainings_are_told_and_drawn_apart(tmp_path):
    runs = [("dense", 90.0, 20), ("dense", 88.0, 6), ("ours", 89.0, 20), ("ours", 87.0, 6), ("trp", 86.0, 20)]
    results = [result(method, top, epochs=epochs) for method, top, epochs in runs]
    names = ["dense, 20 epochs", "dense, 6 epochs", "ours spatial, 20 epochs", "ours spatial, 6 epochs", "trp spatial"]
    assert [told_apart(results)(r) for r in results] == names
    plot_accuracy(tmp_path / "a.svg", results)
    drawn = (tmp_path / "a.svg").read_text()
    assert [drawn.count(f"<!-- {name} -->") for name in names] == [1] * 5


def test_epochs_are_told_with_those_of_the_runs_that_a_run_goes_on_from():
    results = [
        result("dense", 90.0),
        result("decompose", 80.0, epochs=0, config={"start": "run:dense0"}),
        result("ours", 89.0, epochs=4, config={"start": "run:dense0"}),
        result("trp", 88.0, epochs=3, config={"start": "run:ours0"}),
    ]
    epochs = overview(results).columns.index("epochs")
    assert [row[epochs] for row in overview(results).rows] == ["10", "10", "10 + 4", "10 + 4 + 3"]
    assert [row[epochs] for row in overview(results[3:]).rows] == ["3"]
    again = result("trp", 88.0, name="a", epochs=5)
    assert told_apart([*results, again])(results[3]) == "trp spatial, 10 + 4 + 3 epochs"


def test_times_of_other_runtimes_and_batches_say_so():
    elsewhere = result("trp", 88.0, ms_backend="onnxruntime", ms_batch=8)
    assert "| 5.0 (batch 8, onnxruntime) | 2.00x |" in markdown_table(overview([elsewhere]))
    assert "| 5.0 | 2.00x |" in markdown_table(overview([result("trp", 88.0, ms_backend="eager", ms_batch=64)]))
    assert latency(elsewhere).rows[0][:2] == ("onnxruntime", "8")


def test_what_ranks_by_time_were_predicted_to_bring_stands_beside_what_they_bring():
    run = decomposed("a", "ours", "spatial", 88.0)
    assert latency(run).rows == [("eager", "64", "10.0", "8.0", "1.25x", "", "5.0%")]
    layers = [{**e, "ms_before": 4.0, "ms_after": 1.0} if e["reason"] is None else e for e in run["plan"]["layers"]]
    run["plan"] |= {"layers": layers, "ms_dense": 12.0, "macs_dense": 64 * run["macs_dense"]}
    saved = 3.0 * sum(e["reason"] is None for e in layers)
    assert latency(run).rows[0][4:6] == ("1.25x", f"{12 / (12 - saved):.2f}x")
    assert "MACs of 64 examples;" in next(t.note for t in run_tables(run) if t.title == "Cost per layer")
    assert "MACs of one example;" in next(
        t.note for t in run_tables(decomposed("b", "ours", "spatial", 1.0)) if t.title[0] == "C"
    )


def test_a_dense_row_tells_its_time_but_not_how_much_faster_it_is():
    dense = result("dense", 90.0)
    timed = markdown_table(overview([dense | {"ms_dense": 10.0, "ms": 10.0}]))
    assert timed.endswith("| 90.00 |  | 1,000 |  | 100 |  | 10.0 |  |")
    assert markdown_table(overview([dense])).endswith("| 90.00 |  | 1,000 |  | 100 |  |  |  |")


def test_a_row_without_a_reference_has_no_drop():
    alone = result("trp", 88.0)
    del alone["top1_dense"]
    assert "| 88.00 |  | 400 |" in markdown_table(overview([alone]))
    assert "no dense network was named" in overview([alone, result("trp", 88.0, 1)]).note
    assert "no dense network was named" not in overview([result("trp", 88.0)]).note


def test_rows_differ_by_what_they_had_help_from():
    taught = {"start": "a", "training": {"distill": 0.7, "seed": 3}}
    table = markdown_table(overview([result("ours", 88.0, config={"start": "a"}), result("ours", 89.0, config=taught)]))
    assert [row.split(" | ")[0] for row in table.splitlines()[2:]] == ["| ours", "| ours distilled"]
    deeper = result("ours", 89.0, config=taught | {"teacher_model": "resnet56"})
    assert "| ours distilled from resnet56 |" in markdown_table(overview([deeper]))
    several = result("ours", 89.0, config=taught | {"teacher": ["a", "b"]})
    assert "| ours distilled from 2 networks |" in markdown_table(overview([several]))
    assert "ours from scratch" in markdown_table(overview([result("ours", 80.0, config={})]))


def with_settings(name: str, top1: float, seed: int = 0, **training: object) -> dict:
    settings = {"start": "a", "training": {"epochs": 10, "lr": 0.05, "seed": seed, **training}}
    return result("ours", top1, seed, config=settings, name=name)


def test_rows_that_look_the_same_say_what_their_settings_differ_in(tmp_path):
    runs = [with_settings("a", 88.0), with_settings("b", 87.0, lr=0.02), with_settings("c", 89.0, 1, lr=0.02)]
    assert [row[0:4:3] for row in overview(runs).rows] == [("ours, lr 0.05", "88.00"), ("ours, lr 0.02", "88.00 ± 1.41")]
    assert [told_apart(runs)(run) for run in runs[:2]] == ["ours spatial, lr 0.05", "ours spatial, lr 0.02"]
    warm = with_settings("d", 88.0, warmup_steps=9)
    assert [row[0] for row in overview([runs[0], warm]).rows] == ["ours, warmup_steps off", "ours, warmup_steps 9"]
    assert [row[0] for row in overview(runs[1:]).rows] == ["ours"], "seeds are no settings"


def test_what_is_not_the_test_split_says_so():
    assert overview([result("trp", 88.0, test_split="holdout")]).title == "resnet20 on cifar10, holdout"


def test_photographs_of_other_sizes_are_drawn_apart(tmp_path):
    sizes = [{"start": "a", "photographs": {"test_size": size, "test_resize": size}} for size in (112, 224)]
    runs = [result("trp", 60.0 + i, name=str(i), config=config) for i, config in enumerate(sizes)]
    assert [table.title[12:] for table in report_tables.overview(runs)] == ["cifar10, 112 x 112", "cifar10, 224 x 224"]
    plot_accuracy(tmp_path / "a.svg", runs)
    assert (tmp_path / "a.svg").read_text().count("<!-- share of MACs left -->") == 2


def test_trp_by_a_budget_is_told_from_trp_by_a_threshold():
    runs = [decomposed(name, "trp", "spatial", 80.0) for name in ("a", "b")]
    runs[0]["config"]["trp"]["rule"] = "Budget(macs=0.5)"
    assert sorted(row[0] for row in overview(runs).rows) == ["trp", "trp by budget"]


def test_budgets_that_weigh_by_size_are_told_apart():
    runs = [decomposed(name, "ours", "spatial", 80.0) for name in ("a", "b")]
    runs[0]["config"]["trp"]["rule"] = "Budget(macs=0.5)"
    assert [row[0] for row in overview(runs[:1]).rows] == ["ours"]
    runs[1]["config"]["trp"]["rule"] = "Budget(macs=0.5, size_power=0.5)"
    assert sorted(row[0] for row in overview(runs).rows) == ["ours, size_power 0", "ours, size_power 0.5"]


def test_only_what_stands_between_the_marks_is_replaced():
    assert replace_between_marks(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(rp.RankPruneError, match="lacks the lines"):
        replace_between_marks("nothing", "new")


def test_the_readme_shows_the_table_of_the_committed_results():
    table = under_names(report_tables.overview(read_results([ROOT / "benchmarks" / "results"])))
    assert f"{BEGIN}\n{table}\n{END}" in (ROOT / "README.md").read_text(), "run: rankprune report --into README.md"


def test_the_spectrum_of_several_matrices_is_their_root_mean_square():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 6, 3))
    x = torch.zeros(1, 8, 8, 8)
    for name, scheme in (("0", "channel"), ("1", "decoupled")):
        plan = rp.make_plan(model, x, scheme=scheme, rule=rp.FixedRank(1), include=[name])
        weight = model[int(name)].weight.detach().double()
        stack = weight.reshape(2, 4, -1) if name == "0" else weight.flatten(2)  # by group; by output channel
        expected = torch.linalg.svdvals(stack).square().mean(0).sqrt()
        (found,) = planned_spectra(model, plan).values()
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected / expected[0], rtol=1e-4, atol=1e-6)


def test_one_run_has_all_tables_and_several_are_set_side_by_side():
    runs = every_kind_of_run()
    titles = ["Figures", "Latency", "Ranks over training", "Spectra", "Cost per layer", "Layers that stay dense", "Config"]
    assert [table.title for table in tables(runs[1:2])] == ["net on images", *titles]
    assert [table.title for table in tables(runs)] == ["net on images", "other net on images", "Ranks of net, run by run"]
    for table in (t for run in runs for t in (*tables([run]), *tables(runs))):
        assert all(len(row) == len(table.columns) for row in table.rows), table.title


def test_tables_of_a_run_hold_what_its_plan_and_log_say():
    run = decomposed("a", "trp", "spatial", 88.0)
    by_title = {table.title: table for table in run_tables(run)}
    plan = rp.Plan.from_json(json.dumps(run["plan"]))
    costs = {row[0]: row for row in by_title["Cost per layer"].rows}
    assert list(costs) == [layer.name for layer in plan.layers]
    for layer in plan.layers:
        assert costs[layer.name][5:7] == (f"{layer.macs_before:,}", f"{layer.macs_after:,}")
    reasons = {name: reason for reason, names in by_title["Layers that stay dense"].rows for name in names.split(", ")}
    assert reasons == plan.skipped
    name, rank = next(iter(plan.ranks.items()))
    assert (name, str(rank + 2), str(rank)) == by_title["Ranks over training"].rows[0]
    spectrum = {row[0]: row for row in by_title["Spectra"].rows}[name]
    assert int(spectrum[1]) > int(spectrum[2]) == int(spectrum[3]) == rank
    assert ("training.epochs", "3") in by_title["Config"].rows


def test_ranks_over_a_long_training_are_those_of_some_epochs_with_the_first_and_the_last():
    log = [{"epoch": i, "loss": 1.0, "seconds": 1.0, "ranks": {"a": 200 - i}} for i in range(100)]
    shown = ranks_over_training({**decomposed("a", "trp", "spatial", 88.0), "log": log})
    assert len(shown.columns) == 1 + 8
    assert (shown.columns[1], shown.columns[-1]) == ("1", "100")
    assert (shown.rows[0][1], shown.rows[0][-1]) == ("200", "101")


def test_layers_that_a_run_left_dense_keep_their_place_side_by_side():
    ranks = [{"a": 1, "c": 3}, {"a": 1, "b": 2, "c": 3}, {"b": 2, "d": 4}]
    (table,) = ranks_together([result("trp", 80.0, name=str(i), ranks=r) for i, r in enumerate(ranks)])
    assert [row[0] for row in table.rows] == ["a", "b", "c", "d"] or [row[0] for row in table.rows] == ["a", "b", "d", "c"]
    assert table.rows[0][1:] == ("1", "1", "dense")


def test_markdown_cells_cannot_end_their_cell():
    text = markdown([Table(WICKED, (WICKED, "b"), [(WICKED, "1\n2")], note="Note."), Table("Empty", (), (), note="Nothing.")])
    title, table, note, *rest = text.split("\n\n")
    assert (note, rest) == ("Note.", ["## Empty", "Nothing."])
    head, rule, row = table.splitlines()
    assert rule == "|---|--:|"
    for line in (head, row):
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert "<" not in title + head + row


@pytest.mark.parametrize("values", [[0.0, 1.0], [34.67, 88.73], [88.0], [0.0], [1e-6, 2e-6], [-3.0, 1e6]])
def test_an_axis_holds_its_values_between_ticks(values):
    axis = axis_of(values, 300, 20)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 12
    assert (ticks[0], ticks[-1]) == pytest.approx((axis.low, axis.high))
    assert all(20 <= axis(v) <= 300 for v in values)
    assert axis(axis.low) == 300
    assert axis(axis.high) == 20


def test_a_logarithmic_axis_goes_by_powers_of_ten():
    axis = Axis(1e-4, 1, 100, 0, log=True)
    assert [round(axis(t)) for t in (1e-4, 1e-3, 1e-2, 1e-1, 1)] == [100, 75, 50, 25, 0]
    assert axis(0.0) == 100


def test_ticks_are_short():
    assert [tick_label(v) for v in (0, 0.5, 12, 500_000, 2.5e6, 4e9, 1e-4)] == ["0", "0.5", "12", "500k", "2.5M", "4G", "1e-4"]


def test_ticks_are_told_apart():
    assert tick_labels([100, 100.5, 101]) == ["100", "100.5", "101"]
    assert tick_labels([99.98, 100, 100.02]) == ["99.98", "100", "100.02"]
    assert tick_labels([10, 20]) == ["10", "20"]


def report(*arguments: str) -> str:
    return CliRunner().invoke(app, ["report", *arguments], catch_exceptions=False).output


def test_the_command_writes_every_form(tmp_path):
    for run in every_kind_of_run()[:3]:
        run.pop("spectra", None)  # drawing them takes long, and test_pictures_of_results does
        (tmp_path / f"{run['name']}.json").write_text(json.dumps(run))
    text = report(str(tmp_path))
    assert "Ranks of net, run by run" in text
    assert "88.50 ± 0.71" in text
    assert "the last Linear stays dense" in report(str(tmp_path / "trained.json"))
    assert markdown(tables(read_results([tmp_path]))) in report(str(tmp_path), "--markdown")
    each = report(str(tmp_path), "--markdown", "--each")
    assert each.startswith(report(str(tmp_path), "--markdown").strip())
    assert [each.count(f"## {name}: Figures") for name in ("dense", "trained", "trained-seed1")] == [1] * 3
    assert "trained: Layers that stay dense" in report(str(tmp_path), "--each")
    readme, html, plots = tmp_path / "README.md", tmp_path / "page.html", tmp_path / "plots"
    readme.write_text(f"{BEGIN}\n{END}")
    text = report(str(tmp_path), "--into", str(readme), "--plots", str(plots), "--html", str(html))
    assert "| trp | spatial | 3 | 88.50 ± 0.71 |" in readme.read_text()
    assert (plots / "accuracy.svg").is_file()
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [line.split()[0] for line in text.splitlines()] == ["page", "table", "plot"]
    assert "Ranks of net" not in text
    both = CliRunner().invoke(app, ["report", str(tmp_path), "--markdown", "--html", str(html)], catch_exceptions=False)
    assert (both.stdout.split()[:2], both.stderr.split()[0]) == (["##", "net"], "page")
    with pytest.raises(rp.RankPruneError, match="--each would do nothing: of a single run"):
        report(str(tmp_path / "trained.json"), "--each")


def test_terminal_tables_take_texts_as_they_are(tmp_path):
    (wicked,) = [run for run in every_kind_of_run() if run["name"] == WICKED]
    (tmp_path / "a.json").write_text(json.dumps(wicked))
    assert WICKED in report(str(tmp_path))


def test_rows_of_other_images_are_told_apart() -> None:
    table = markdown_table(overview([result("ours", 88.0, source=place) for place in ("large", "small")]))
    assert "| ours, source large |" in table
    assert "| ours, source small |" in table
