"""The pictures that matplotlib draws of results."""

import re

import pytest
from torch import nn

import rankprune as rp
from example_results import result
from rankprune.projection import planned_spectra
from rankprune.report.plots import plot_accuracy, plot_results, plot_training


def test_other_images_of_the_same_name_are_drawn_apart(tmp_path):
    plot_accuracy(tmp_path / "a.svg", [result("trp", 88.0, test_digest=1), result("trp", 90.0, seed=1, test_digest=2)])
    assert (tmp_path / "a.svg").read_text().count("<!-- share of MACs left -->") == 2


def test_error_bars_go_from_the_worst_seed_to_the_best(tmp_path, monkeypatch):
    drawn = []
    axes = pytest.importorskip("matplotlib.axes").Axes
    errorbar = axes.errorbar
    monkeypatch.setattr(axes, "errorbar", lambda *args, **options: drawn.append(options["yerr"]) or errorbar(*args, **options))
    plot_accuracy(tmp_path / "a.svg", [result("trp", top, seed) for seed, top in enumerate((88.0, 88.1, 89.0))])
    (below,), (above,) = drawn[0]
    assert (below, above) == (pytest.approx(88.3667 - 88.0, abs=1e-3), pytest.approx(89.0 - 88.3667, abs=1e-3))


def test_what_is_far_below_the_others_does_not_press_them_together(tmp_path):
    plot_accuracy(tmp_path / "a.svg", [result("dense", 90.0), result("trp", 88.0), result("decompose", 34.6)])
    drawn = (tmp_path / "a.svg").read_text()
    assert "<!-- 34.6 -->" in drawn
    assert "<!-- 40 -->" not in drawn, "on the axis"


def test_pictures_stay_in_their_folder_and_apart(tmp_path):
    spectra = {"before": {"a": [1.0, 0.5]}, "after": {"a": [1.0, 0.0]}}
    results = [result("trp", 88.0, seed, name=name, spectra=spectra) for seed, name in enumerate(("../../x", "x", "..", "x"))]
    files = plot_results(tmp_path / "plots", results)
    assert [file.name for file in files] == ["accuracy.svg", "x.svg", "x-2.svg", "run.svg", "x-3.svg"]
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == sorted(file.name for file in files)
    assert [path.name for path in tmp_path.iterdir()] == ["plots"]


def test_pictures_of_results(tmp_path):
    spectra = {"before": {"a": [1.0, 0.5]}, "after": {"a": [1.0, 0.0]}}
    log = [{"epoch": 0, "ranks": {}}, {"epoch": 1, "ranks": {"a": 1}}]
    results = [result("dense", 90.0), result("trp", 88.0, spectra=spectra, log=log), result("decompose", 60.0, macs=500)]
    files = plot_results(tmp_path, results)
    assert [file.name for file in files] == ["accuracy.svg", "trp0.svg"]
    drawn = [file.read_text() for file in files]
    assert all(text.startswith("<?xml") and len(text) > 5000 for text in drawn)
    assert drawn == [file.read_text() for file in plot_results(tmp_path, results)], "the same results draw the same file"


def test_panels_stand_two_by_two_and_none_is_of_dense_networks_alone(tmp_path):
    def drawn(*models: str) -> tuple[list[str], float, float]:
        results = [result("trp", 88.0, name=model, model=model) for model in models]
        plot_accuracy(tmp_path / "a.svg", [*results, result("dense", 90.0, model="alone")])
        text = (tmp_path / "a.svg").read_text()
        width, height = (float(re.search(rf'{side}="([\d.]+)pt"', text)[1]) for side in ("width", "height"))
        return re.findall("<!-- (.*) on cifar10 -->", text), width, height

    (one, width, height), (three, wide, high) = drawn("a"), drawn("a", "b", "c")
    assert (one, three) == (["a"], ["a", "b", "c"])
    assert (wide, high) == (2 * width, 2 * height)
    assert drawn()[0] == ["alone"]


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
