"""What a training shows while it runs."""

import io
import re
import sys

import pytest
import torch

import rankprune as rp

console = pytest.importorskip("rankprune.cli.console", exc_type=ImportError)

from rankprune.recipes.progress import Progress  # noqa: E402


def steps(bars, numbers: range, plan: rp.Plan | None = None) -> None:
    for i in numbers:
        bars.update("trp", Progress(i // 4, i % 4 + 1, 4, 0.1, torch.tensor(2.5), 64, plan))


def test_without_a_terminal_a_line_every_so_often(capsys: pytest.CaptureFixture) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 16, 3), torch.nn.Flatten(), torch.nn.Linear(256, 2)
    )
    plan = rp.make_plan(model, torch.zeros(1, 3, 8, 8), scheme="spatial", rule=rp.FixedRank(4))
    with console.TrainingBars(3, every_s=0) as bars:
        steps(bars, range(5, 8))  # resumed
        steps(bars, range(8, 12), plan)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[2].startswith("trp  67%  epoch 2/3  loss 2.500  lr 0.1  ")
    assert "MACs" not in lines[2]
    assert re.search(r"  MACs \d\d%  mean rank 4  \d+ images/s  ends \w{3} \d\d:\d\d$", lines[5]), lines[5]
    assert lines[6].startswith("trp  100%  epoch 3/3")


def test_a_line_comes_at_the_end_and_not_with_every_step(capsys: pytest.CaptureFixture) -> None:
    with console.TrainingBars(3) as bars:
        steps(bars, range(12))
    assert [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()] == ["100%"]


def test_of_several_processes_on_one_terminal_one_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    for shown in (False, True):
        screen = io.StringIO()
        monkeypatch.setattr(console, "console", console.Console(file=screen, force_terminal=True))
        streams = sys.stdout, sys.stderr
        with console.TrainingBars(3, shown=shown):
            assert (sys.stdout, sys.stderr) == streams, "a forked process may find those that draw the bar locked"
        assert bool(screen.getvalue()) is shown


def test_figures_are_whole_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(console, "console", console.Console(width=30, force_terminal=True))
    monkeypatch.setenv("COLUMNS", "30")
    columns = ["network", "top-1 %", "MACs", "params"]
    console.show_table("t", columns, [["encoder.layer.11.attention.query", "88.42 ± 0.11", "40,551,040", "269,722"]])
    shown = capsys.readouterr().out
    assert all(figure in shown for figure in ("88.42 ± 0.11", "40,551,040", "269,722"))
    assert "encoder.layer.11.attention.query" not in shown, "words are folded"


def test_long_heads_are_folded_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(console, "console", console.Console(width=80, force_terminal=True))
    columns = [f"resnet20-ours-spatial-2.84x-distilled-seed{i}" for i in range(4)]
    console.show_table("t", ["layer", *columns], [["layer1.0.conv1", "9/16", "8/16", "7/16", "6/16"]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.count("resnet20-") == 4 for line in lines)
    assert any(re.fullmatch(r"\W*layer1.0.conv1 +9/16 +8/16 +7/16 +6/16\W*", line) for line in lines)


def test_all_columns_of_a_wide_table_reach_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(console, "console", console.Console(width=80, force_terminal=False))
    columns = [f"resnet20-ours-spatial-2.84x-distilled-seed{i}" for i in range(60)]
    console.show_table("t", ["layer", *columns], [["conv1", *map(str, range(60))]])
    assert columns[-1] in capsys.readouterr().out
