"""The page of a report: what is in it."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

import rankprune as rp
from example_results import WICKED, decomposed, dense, every_kind_of_run
from rankprune.report.page import page
from rankprune.report.pictures import Point, bars, curve, heat_map, scatter, spectrum
from rankprune.report.tables import OLDER

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Reader(HTMLParser):
    """Tags with their attributes, the text of each, and whether every tag is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.tags)

    def of(self, tag: str) -> list[str]:
        return [text for t, text in self.texts if t == tag]


@pytest.fixture(scope="module")
def read() -> Reader:
    return Reader(page(every_kind_of_run()))


def test_every_run_is_told_of_with_its_layers_and_reasons(read: Reader) -> None:
    shown = read.of("td") + read.of("th")
    for run in every_kind_of_run():
        assert run["name"] in read.of("h2")
        assert run["name"] in read.of("a")
        for layer in run.get("plan", {"layers": ()})["layers"]:
            assert layer["name"] in read.of("th")
            if layer["reason"]:
                assert layer["reason"] in read.of("th")
            else:
                assert f"{layer['rank']}/{layer['full_rank']}" in shown
        for key in ("top1", "top1_dense"):
            assert key not in run or any(f"{run[key]:.2f}" in text for _, text in read.texts)
    assert "88.50 ± 0.71" in shown


def test_links_lead_to_runs(read: Reader) -> None:
    targets = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert [attributes["href"] for tag, attributes in read.tags if tag == "a"] == [f"#{target}" for target in targets]
    assert len(set(targets)) == len(every_kind_of_run())


def test_every_picture_says_what_it_shows(read: Reader) -> None:
    said = [a.get("aria-label") for tag, a in read.tags if tag == "svg" and a.get("aria-hidden") != "true"]
    assert all(said)
    plans = [run for run in every_kind_of_run() if "plan" in run]
    assert len([text for text in said if text and text.startswith("Singular values")]) == sum(len(r["ranks"]) for r in plans)
    for start in ("Accuracy against MACs", "Accuracy against ms", "Ranks of", "MACs of", "Training loss"):
        assert any(text and text.startswith(start) for text in said), start


def test_no_text_becomes_markup(read: Reader) -> None:
    assert read.count("script") == 0
    assert WICKED in read.of("h2")
    assert WICKED in read.of("td"), "the config"
    assert f"{WICKED} layer" in read.of("th")
    assert read.count("h1") == read.count("main") == 1


def test_nothing_is_loaded_and_the_policy_says_so(read: Reader) -> None:
    for tag, attributes in read.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith(("#", "data:,")), attributes
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    assert not re.search(r"https?://|url\(|@import", page(every_kind_of_run()))
    (style,) = read.of("style")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = [a["content"] or "" for tag, a in read.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert f"style-src 'sha256-{digest}'" in policy


def test_an_old_result_says_what_it_lacks() -> None:
    (old,) = [run for run in every_kind_of_run() if run["name"] == "old"]
    shown = Reader(page([old]))
    assert OLDER in shown.of("p")
    assert "Latency, Spectra, Cost per layer, Layers that stay dense. " in shown.of("b")
    assert "Ranks over training" in shown.of("h3")
    assert not {"Latency", "Spectra"} & set(shown.of("h3"))


def test_a_plan_of_another_format_is_left_out() -> None:
    run = decomposed("a", "trp", "spatial", 88.0)
    run["plan"]["format"] = 99
    assert "Cost per layer, Layers that stay dense. " in Reader(page([run])).of("b")


def test_a_dense_run_alone() -> None:
    shown = Reader(page([dense("only", 90.0)]))
    assert shown.of("h2") == ["Results", "only"]
    assert "Accuracy against ms, net on images" not in shown.of("h3")


def test_a_run_tells_all_epochs_that_it_was_trained_for() -> None:
    first, more = dense("dense", 90.0), dense("more", 91.0)
    more["config"]["start"] = "run:dense"
    untrained = decomposed("plain", "decompose", "channel", 40.0)
    shown = [text.strip() for text in Reader(page([first, more])).of("li")]
    links = {"dense, 3 epochs, 90.00 %", "dense, 3 + 3 epochs, 91.00 %"}
    assert {*links, "3 epochs", "3 + 3 epochs"} <= set(shown)
    assert "not trained" in Reader(page([untrained])).of("li")


def test_the_truncation_of_what_was_not_trained_is_called_so() -> None:
    for run, said in (
        (decomposed("a", "trp", "spatial", 80.0), "before training (grey) and after it (blue)"),
        (decomposed("b", "decompose", "spatial", 80.0), "before truncation (grey) and after it (blue)"),
        (decomposed("c", "decompose+finetune", "spatial", 80.0), "before truncation (grey) and after it (blue)"),
    ):
        assert any(said in text for text in Reader(page([run])).of("p"))


def test_runs_from_scratch_have_pictures_and_dense_marks_of_their_own() -> None:
    runs = [decomposed(name, "trp", "spatial", 80.0) for name in ("a", "b", "c")]
    for run, reference, top1 in zip(runs, ("run:short", "run:short", "run:long"), (90.0, 90.0, 92.0), strict=True):
        run["config"]["reference"], run["top1_dense"] = reference, top1
    runs[2]["config"]["start"] = None
    read = Reader(page(runs))
    assert [text for text in read.of("h3") if text.startswith("Accuracy against ms")] == [
        "Accuracy against ms, net on images",
        "Accuracy against ms, net on images, from scratch",
    ]
    marks = [text for text in read.of("title") if text.startswith(("short", "long"))]
    assert marks == ["short: 90.00 %"] * 2 + ["long: 92.00 %"] * 2  # in each picture once


def test_the_same_results_make_the_same_page() -> None:
    assert page(every_kind_of_run()) == page(every_kind_of_run()[::-1])


def test_bars_are_as_long_as_the_macs() -> None:
    plan = rp.Plan.from_json(json.dumps(decomposed("a", "trp", "spatial", 88.0)["plan"]))
    wide = [part for part in bars(plan.layers, "64 examples", "said").iter("rect") if part.get("class") == "before"]
    most = max(layer.macs_before or 0 for layer in plan.layers)
    longest = max(float(part.get("width") or 0) for part in wide)
    for part, layer in zip(wide, plan.layers, strict=True):
        assert float(part.get("width") or 0) == pytest.approx(max(longest * (layer.macs_before or 0) / most, 0.5), abs=0.02)
    narrow = [part for part in bars(plan.layers, "64 examples", "said").iter("rect") if part.get("class") != "before"]
    assert len(narrow) == len(plan.ranks)


def test_a_heat_map_joins_equal_ranks_and_fades_with_them() -> None:
    history = [(1, {"a": 8}), (2, {"a": 4, "b": 2}), (3, {"a": 4, "b": 2})]
    cells = list(heat_map(history, {"a": 16}, ["a", "b"], "said").iter("rect"))
    assert [next(cell.iter("title")).text for cell in cells] == [
        "epoch 1: 8/16",
        "epochs 2 to 3: 4/16",
        "epoch 1: dense",
        "epochs 2 to 3: 2",
    ]
    assert [cell.get("class") for cell in cells] == [None, None, "dense", None]
    assert float(cells[0].get("fill-opacity") or 0) == 1 > float(cells[1].get("fill-opacity") or 0) > 0
    ends = [(float(c.get("x") or 0), float(c.get("x") or 0) + float(c.get("width") or 0)) for c in cells[:2]]
    assert 0 < ends[1][0] - ends[0][1] < 2
    assert ends[1][1] - ends[1][0] > 1.9 * (ends[0][1] - ends[0][0])


def test_a_heat_map_of_a_long_training_shows_some_epochs_with_both_ends() -> None:
    cells = list(heat_map([(i, {"a": 2000 - i}) for i in range(1, 1001)], {}, ["a"], "said").iter("rect"))
    tips = [next(cell.iter("title")).text for cell in cells]
    assert len(cells) == 40
    assert (tips[0], tips[-1]) == ("epoch 1: 1999", "epoch 1000: 1000")
    assert all(float(cell.get("width") or 0) > 3 for cell in cells)


def test_lines_go_where_the_values_are() -> None:
    dots = list(curve([(1, 4.0), (2, 2.0), (3, 0.0)], "x", "y", "said").iter("circle"))
    x, y = ([float(dot.get(name) or 0) for dot in dots] for name in ("cx", "cy"))
    assert 0 < x[1] - x[0] == pytest.approx(x[2] - x[1])
    assert 0 < y[1] - y[0] == pytest.approx(y[2] - y[1]), "down the picture"


def test_long_spectra_are_thinned_and_keep_both_ends() -> None:
    path = next(spectrum((), [1.0 / i for i in range(1, 2001)], 7, "said").iter("path")).get("d") or ""
    points = [tuple(map(float, pair.split())) for pair in path[1:].split("L")]
    assert len(points) == 80
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(points))
    assert (points[0][1], points[-1][0]) == (8.0, 154.0)


def test_what_is_far_below_the_best_stands_at_the_lower_edge_with_its_value() -> None:
    points = [
        Point(x, top, top, top, 1, "circle", "") for x, top in ((10, 90.0), (50, 79.0), (50, 40.0), (52, 30.0), (95, 20.0))
    ]
    drawn = scatter(points, "x", "y", "said", 100, whole=(0, 100))
    told = [(text.text, float(text.attrib["y"])) for text in drawn.iter("text") if "\u2193" in str(text.text)]
    assert [text for text, _ in told] == ["\u2193 40.0", "\u2193 30.0", "\u2193 20.0"]
    assert told[0][1] == told[2][1] > told[1][1], "close ones one above the other"
