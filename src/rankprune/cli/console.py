"""What the terminal shows: progress bars and tables."""

import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from textwrap import wrap

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from rankprune.recipes.progress import Progress as Step

console = Console()

WIDE, NARROW = 1000, 12
"""Characters: of a table in a file, and of a column of words that is folded."""


class TrainingBars:
    """One progress bar a training, or a line a minute where there is no terminal; a context manager, fed by on_step callbacks.

    Args:
        epochs: of each training.
        every_s: seconds between two lines, where there is no terminal.
        shown: whether to show any; of several processes on one terminal only one should.
    """

    def __init__(self, epochs: int, every_s: float = 60.0, *, shown: bool = True) -> None:
        self.epochs, self.every_s = epochs, every_s
        self._tasks: dict[str, TaskID] = {}
        self._shown: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            speed_estimate_period=120,
            disable=not (shown and console.is_terminal),
            redirect_stdout=False,  # a process that is forked while the bar is drawn would wait for its lock for ever
            redirect_stderr=False,
        )

    def __enter__(self) -> "TrainingBars":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(None, None, None)

    def update(self, name: str, step: Step) -> None:
        """Show that the training `name` has come to `step`."""
        total = self.epochs * step.steps_per_epoch
        done = step.epoch * step.steps_per_epoch + step.step
        if name not in self._tasks:  # a resumed one begins where it was
            self._tasks[name] = self._progress.add_task(name, total=total, completed=done - 1, note="")
            self._shown[name] = time.monotonic()
        self._progress.update(self._tasks[name], completed=done)
        if time.monotonic() - self._shown[name] < (1 if console.is_terminal else self.every_s) and done < total:
            return
        self._shown[name] = time.monotonic()
        task = self._progress.tasks[self._tasks[name]]
        note = _note(step, self.epochs, task.speed, task.time_remaining)
        self._progress.update(task.id, note=note)
        if not console.is_terminal:
            say(f"{name}  {done / total:.0%}  {note}")

    def named(self, name: str) -> Callable[[Step], None]:
        """The callback for the training `name`."""
        return lambda step: self.update(name, step)


def _note(step: Step, epochs: int, steps_per_s: float | None, seconds_left: float | None) -> str:
    words = [f"epoch {step.epoch + 1}/{epochs}", f"loss {float(step.loss):.3f}", f"lr {step.lr:.3g}"]
    if plan := step.plan:
        if plan.macs and plan.macs_dense:
            words.append(f"MACs {plan.macs / plan.macs_dense:.0%}")
        if plan.ranks:
            words.append(f"mean rank {statistics.mean(plan.ranks.values()):.0f}")
    if steps_per_s:
        words.append(f"{steps_per_s * step.images:.0f} images/s")
    if seconds_left:
        end = datetime.datetime.now() + datetime.timedelta(seconds=seconds_left)
        words.append(f"ends {end:%a %H:%M}")
    return "  ".join(words)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1, note: str = "") -> None:
    """Print a table, all columns but the first `words` right-aligned, and a note under it; of one without rows the note.

    Where it is too wide for the terminal, heads and words are folded.
    """
    cells = [max((len(row[i]) for row in rows), default=0) for i in range(len(columns))]
    lines = [[column] for column in columns]
    if console.is_terminal and sum(map(max, map(len, columns), cells)) + 2 * len(columns) + 1 > console.width:
        lines = [wrap(column, max(NARROW, width)) for column, width in zip(columns, cells, strict=True)]
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    least = 0
    for i, head in enumerate(lines):
        column, whole = "\n".join(head), max([cells[i], *map(len, head)])
        if i < words:
            table.add_column(column, overflow="fold")
            least += min(whole, NARROW)
        else:  # figures are never folded
            table.add_column(column, justify="right", no_wrap=True, min_width=whole)
            least += whole
    for row in rows:
        table.add_row(*map(Text, row))
    folded = max(console.width, least + 2 * len(columns) + 1)
    Console(width=folded if console.is_terminal else max(WIDE, folded)).print(table if rows else Text(title))
    if note:
        say(note)


def say(text: str, error: bool = False) -> None:
    """Print a line as it is, to standard output or else standard error."""
    (Console(stderr=True) if error else console).print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
