"""Reading results, and which of them are seeds of one experiment."""

import json
from pathlib import Path

import pytest

import rankprune as rp
from example_results import example, result
from rankprune.report.results import in_order, read_results, seeds_together

ROOT = Path(__file__).parent.parent


def test_what_a_run_builds_on_sets_experiments_apart_but_for_its_seed():
    configs = [
        {"start": "a", "teacher": "run:dense"},
        {"start": "a", "teacher": "run:dense-seed1"},
        {"start": "b", "teacher": "run:dense"},
        {"start": "a", "teacher": "run:wide"},
    ]
    seeds = [0, 1, 0, 0]
    results = [result("ours", 88.0, seed, config=settings) for seed, settings in zip(seeds, configs, strict=True)]
    assert [len(group) for group in seeds_together(results)] == [2, 1, 1]
    again = result("ours", 80.0, 0, config=configs[0])
    assert [len(group) for group in seeds_together([*results, again])] == [2, 1, 1, 1]


def test_other_images_are_no_other_seed():
    runs = [result("trp", 88.0, seed, train_images=images, test_images=30) for seed, images in enumerate((48, 48, 50))]
    assert [len(group) for group in seeds_together(runs)] == [2, 1]
    assert [len(group) for group in seeds_together([runs[0], runs[1] | {"source": "elsewhere"}])] == [1, 1]
    assert [len(group) for group in seeds_together([runs[0], runs[1] | {"test_digest": 7}])] == [1, 1]


def test_settings_that_are_off_do_not_keep_seeds_apart():
    old, new = (
        result("trp", 88.0, seed, config=settings)
        for seed, settings in enumerate(({"start": "a"}, {"start": "a", "photographs": None}))
    )
    other = result("trp", 87.0, 2, config={"start": "a", "photographs": {"size": 64}})
    assert [len(group) for group in seeds_together([old, new, other])] == [2, 1]


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_a_result_holds_numbers_only(tmp_path, number):
    (tmp_path / "a.json").write_text(json.dumps(result("trp", 88.0)).replace("88.0", number))
    with pytest.raises(rp.RankPruneError, match=f"is not JSON .{number} is no number"):
        read_results([tmp_path / "a.json"])


@pytest.mark.parametrize("field", ["top1", "macs", "ranks", "top1_before_decomposition"])
def test_a_decomposed_result_needs_its_own_fields(tmp_path, field):
    whole = result("trp", 88.0, ranks={})
    (tmp_path / "a.json").write_text(json.dumps({k: v for k, v in whole.items() if k != field}))
    with pytest.raises(rp.RankPruneError, match=f"no result of an experiment: it lacks {field}"):
        read_results([tmp_path / "a.json"])


def test_a_dense_result_needs_all_but_ranks(tmp_path):
    whole = result("dense", 88.0)
    (tmp_path / "a.json").write_text(json.dumps(whole))
    assert read_results([tmp_path / "a.json"]) == [whole]
    for field in ("top1", "macs", "top1_dense"):
        (tmp_path / "a.json").write_text(json.dumps({k: v for k, v in whole.items() if k != field}))
        with pytest.raises(rp.RankPruneError, match=f"it lacks {field}$"):
            read_results([tmp_path / "a.json"])


def test_rows_of_one_budget_stand_together_by_scheme():
    def row(name: str, scheme: str, fraction: str, macs: int) -> dict:
        config = {"start": "x", "trp": {"rule": f"Budget(macs={fraction})"}}
        return example(name, "ours", scheme, macs=macs) | {"config": config}

    rows = [row("a-distilled", "spatial", "1/2", 498), row("b", "channel", "1/2", 499), row("a", "spatial", "1/2", 500)]
    rows += [row("c", "spatial", "1/4", 249), row("d", "spatial", "1", 497)]
    rows.append(example("e", "trp", "spatial", macs=400))
    rows.append(example("dense", "dense", None, macs=1000) | {"config": {"start": "x", "trp": {"rule": "Budget(macs=0.1)"}}})
    assert [r["name"] for r in in_order(rows)] == ["dense", "c", "e", "b", "a", "a-distilled", "d"]


def test_results_are_read_in_order_and_other_files_left_alone(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps(result("trp", 1.0)))
    (tmp_path / "a.json").write_text(json.dumps(result("dense", 2.0)))
    (tmp_path / "c.json").write_text("{}")
    assert [r["method"] for r in read_results([tmp_path])] == ["dense", "trp"]


def test_results_of_trainings_are_found_in_their_folders(tmp_path):
    for name in ("mine", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "result.json").write_text(json.dumps(result("trp", 1.0, name=name)))
    assert [r["name"] for r in read_results([tmp_path / "runs"])] == ["mine", "other"]
    assert [r["name"] for r in read_results([tmp_path / "runs" / "mine"])] == ["mine"]


@pytest.mark.parametrize("content", [None, "{"])
def test_no_results_or_a_broken_one_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(rp.RankPruneError, match=r"results of experiments|is not JSON"):
        read_results([tmp_path])


def test_files_and_folders_are_read_once_each(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(result("dense", 2.0)))
    (tmp_path / "b.json").write_text(json.dumps(result("trp", 1.0)))
    assert [r["method"] for r in read_results([tmp_path / "b.json", tmp_path])] == ["trp", "dense"]


def test_a_file_asked_for_must_be_a_result(tmp_path):
    (tmp_path / "a.json").write_text('{"method": "trp"}')
    with pytest.raises(rp.RankPruneError, match="lacks config, dataset"):
        read_results([tmp_path / "a.json"])
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(rp.RankPruneError, match="it lacks all fields"):
        read_results([tmp_path / "a.json"])
    with pytest.raises(rp.RankPruneError, match=r"there is no .*nowhere.*name the folder of a `rankprune train`"):
        read_results([tmp_path / "nowhere.json"])


def test_committed_results_say_how_they_came_about():
    for r in read_results([ROOT / "benchmarks" / "results"]):
        assert {"config", "seed", "commit", "versions", "cpu", "date", "wall_s", "epochs"} <= set(r)
        assert r["commit"], "a result comes from a commit"
        assert not r["commit"].endswith("+"), "a result comes from files as committed"
