"""A bar that says what is being measured now, on a terminal; nothing elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Steps:
    """One line, reused from step to step; a context manager."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),  # it has names of runs and tasks
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("loading", total=None)
        self._text = ""

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, text: str, done: int, total: int) -> None:
        """`done` of `total` of the step called `text`; a new text starts the clock again."""
        if text != self._text:
            self._text = text
            self._bar.reset(self._task, description=text, total=total)
        self._bar.update(self._task, completed=done, total=total)
