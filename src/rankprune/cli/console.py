"""What the terminal shows: progress bars and tables."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rankprune.recipes.training import Progress as Step

console = Console()


class TrainingBars:
    """One progress bar a training; a context manager, fed by the training's on_step callbacks."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self._tasks: dict[str, TaskID] = {}
        columns = (TextColumn("{task.description:<8}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._progress = Progress(
            *columns, TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn(), console=console
        )

    def __enter__(self) -> "TrainingBars":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(None, None, None)

    def update(self, name: str, step: Step) -> None:
        """Show that the training `name` has come to `step`."""
        total = self.epochs * step.steps_per_epoch
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note="")
        done = step.epoch * step.steps_per_epoch + step.step
        if step.step % 10 == 0 or done == total:
            note = f"epoch {step.epoch + 1}/{self.epochs}  loss {float(step.loss):.3f}  lr {step.lr:.3g}"
            self._progress.update(self._tasks[name], completed=done, note=note)

    def named(self, name: str) -> Callable[[Step], None]:
        """The callback for the training `name`."""
        return lambda step: self.update(name, step)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; all columns but the first are right-aligned."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def say(text: str) -> None:
    """Print a line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
