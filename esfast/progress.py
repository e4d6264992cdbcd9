"""What a run shows while it goes: a line a generation, and on a terminal a bar below them.

Piped, the lines are all there is; nothing is drawn over. On a narrow terminal a line leaves out
what the bar or the end of the run says as well, and the bar its bar.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from esfast.held_out import HeldOut

NARROW = 64  # columns, below which the bar itself would be a few cells


@dataclass(frozen=True)
class GenerationReport:
    """One generation in numbers.

    `generation` counts from 1; rewards are means over the prompts, `reward_spread` the standard
    deviation over members; `seconds` is the generation's wall time without the held-out
    evaluation, `outside_share` the share of the run so far outside generation and scoring.
    """

    generation: int
    reward_mean: float
    reward_spread: float
    reward_best: float
    failed_rewards: int
    tokens_per_second: float
    seconds: float
    outside_share: float
    saturated: int

    def numbers(self) -> dict[str, float]:
        """The fields but the generation, as metrics.jsonl and the loggers take them."""
        return {name: value for name, value in vars(self).items() if name != "generation"}


class RunProgress:
    """Shows one run; a context manager, so that the terminal is given back whatever happens."""

    def __init__(self, generations: int, members: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self._generations = generations
        self._members = members
        self._seconds: list[float] = []
        doing, share = TextColumn("{task.description}"), TextColumn("{task.percentage:3.0f} %")
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        wide = (doing, BarColumn(bar_width=None), share, *times)
        self._bar = Progress(
            *(wide if self.console.width >= NARROW else (doing, share)),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=generations * members)

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def doing(self, what: str) -> None:
        """What the bar says is going on."""
        self._bar.update(self._task, description=what)

    def member(self, generation: int, member: int) -> None:
        """Member `member` (from 0) of generation `generation` (from 0) has been evaluated."""
        done = generation * self._members + member + 1
        text = (
            f"generation {generation + 1}/{self._generations} member {member + 1}/{self._members}"
        )
        self._bar.update(self._task, completed=done, description=text)

    def generation(self, report: GenerationReport, held_out: HeldOut | None) -> None:
        """A generation is over."""
        self._seconds.append(report.seconds)
        width = len(str(self._generations))
        parts = [
            f"generation {report.generation:{width}}/{self._generations}",
            f"reward {report.reward_mean:.3f} ± {report.reward_spread:.3f}",
            f"held-out {held_out.mean:.3f}" if held_out is not None else " " * 14,
            f"{report.tokens_per_second:5.0f} tokens/s",
        ]
        failed = [f"{report.failed_rewards} rewards failed"] if report.failed_rewards else []
        outside = f"outside {100 * report.outside_share:4.1f} %"
        line = "  ".join([*parts, outside, f"left {self._left(report.generation)}", *failed])
        if self.console.is_terminal and len(line) > self.console.width:
            line = "  ".join([*parts, *failed])
        self.note(line)

    def _left(self, generation: int) -> str:
        """Minutes and seconds at the pace of the last five generations."""
        recent = self._seconds[-5:]
        seconds = math.ceil((self._generations - generation) * sum(recent) / len(recent))
        return f"{seconds // 60}:{seconds % 60:02d}"
