"""What all sections share: the runs, in groups that differ in their seed alone, and their curves.

Where a group has several seeds, figures show the mean over seeds with their range, and a table adds
the mean with Student's 95 % interval; else intervals are those of the runs' own prompts. A mean is
over one run a seed, of those that got furthest: a repeat is no seed, and what a run scored when it
was stopped is no final score of its group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from esfast.forgetting.intervals import t95
from esfast.html_report.drawing import LIGHT, Series
from esfast.html_report.page import Html, text
from esfast.html_report.run_data import RunData, Subject

LONG_NAME = 28  # letters that a table's first column holds on one line


@dataclass(frozen=True)
class Points:
    """One run's curve: generations, values, and intervals or None."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, or one run; `number` gives the colour."""

    number: int
    runs: tuple[RunData, ...]

    @property
    def generations(self) -> int:
        """Of the run that got furthest."""
        return max(run.generations for run in self.runs)

    @cached_property
    def averaged(self) -> tuple[RunData, ...]:
        """What curves and means are taken over."""
        kept: dict[int | None, RunData] = {}
        for run in self.runs:
            if run.generations == self.generations:
                kept.setdefault(run.seed, run)
        return tuple(kept.values())

    @property
    def left_out(self) -> list[str]:
        """The other runs, and why."""
        return [f"{run.name} ({self._reason(run)})" for run in self.runs
                if run not in self.averaged]  # fmt: skip

    def _reason(self, run: RunData) -> str:
        if run.generations < self.generations:
            return f"{run.generations} of {self.generations} generations"
        same = next(kept for kept in self.averaged if kept.seed == run.seed)
        return f"of the same seed as {same.name}"

    @cached_property
    def label(self) -> str:
        """The run's name, or what the names have in common, with how many are averaged."""
        if len(self.runs) == 1:
            return self.runs[0].name
        count, all_runs = len(self.averaged), len(self.runs)
        shown = f"{count} seeds" if count == all_runs else f"{count} of {all_runs} runs"
        return f"{_common_name(self.runs)} ({shown})"


@dataclass(frozen=True)
class ReportData:
    """Runs in the order given; extras: subjects of --forgetting that are none of them."""

    runs: tuple[RunData, ...]
    extras: tuple[Subject, ...] = ()

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """In the order of their first runs."""
        found: dict[str, list[RunData]] = {}
        for run in self.runs:
            found.setdefault(run.family, []).append(run)
        return tuple(Group(number, tuple(runs)) for number, runs in enumerate(found.values()))

    @property
    def seeds(self) -> bool:
        """Whether some group has several."""
        return any(len(group.averaged) > 1 for group in self.groups)

    def bands(self, of_one: str) -> str:
        """What a caption says of lines and bands; of_one: what a single run's bands are."""
        if not self.seeds:
            return f"Bands: {of_one}."
        single = any(len(group.averaged) == 1 for group in self.groups)
        said = "Lines of several seeds are their mean, bands their range"
        return f"{said}; bands of a single run: {of_one}." if single else f"{said}."

    @cached_property
    def subjects(self) -> tuple[tuple[int, Subject], ...]:
        """Everything that was diagnosed, with the number of its group; extras have their own."""
        own = [(self.group_of(run).number, run.subject) for run in self.runs if run.subject]
        return tuple(own) + tuple(
            (len(self.groups) + number, extra) for number, extra in enumerate(self.extras)
        )

    def averaged(self, number: int, members: Sequence[Subject]) -> list[Subject]:
        """Those of a group's subjects that its curves are taken over."""
        if number >= len(self.groups):  # extras
            return list(members)
        names = {run.name for run in self.groups[number].averaged}
        return [subject for subject in members if subject.name in names]

    @cached_property
    def subject_groups(self) -> tuple[tuple[int, str, tuple[Subject, ...]], ...]:
        """(number, label, subjects) of each group that was diagnosed."""
        numbers = list(dict.fromkeys(number for number, _ in self.subjects))
        labels = {group.number: group.label for group in self.groups}
        out = []
        for number in numbers:
            members = tuple(s for n, s in self.subjects if n == number)
            out.append((number, labels.get(number, members[0].name), members))
        return tuple(out)

    def group_of(self, run: RunData) -> Group:
        """The group of a run."""
        return next(group for group in self.groups if run in group.runs)

    def named(self, run: RunData) -> Html:
        """A run's name with its colour."""
        return swatch(self.group_of(run).number, run.name)

    def series(self, points_of: Callable[[RunData], Points]) -> list[Series]:
        """A curve a group: the run's own, or mean and range of the seeds."""
        out = []
        for group in self.groups:
            points = [p for run in group.averaged if len((p := points_of(run)).x)]
            if points:
                out.append(merged(group.label, group.number, points))
        return out


def merged(label: str, number: int, points: Sequence[Points]) -> Series:
    """One curve of several runs': mean and range at the generations that all have."""
    if len(points) == 1:
        one = points[0]
        return Series(label, number, one.x, one.y, one.low, one.high)
    common = sorted(set.intersection(*(set(p.x) for p in points)))
    values = np.array([[dict(zip(p.x, p.y, strict=True))[x] for x in common] for p in points])
    if not common:
        return Series(label, number, (), ())
    low, high = values.min(axis=0).tolist(), values.max(axis=0).tolist()
    return Series(label, number, common, values.mean(axis=0).tolist(), low, high)


def student(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval of the mean; of no width for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    half = t95(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def swatch(number: int, name: str) -> Html:
    """A name with the dot of its colour in the figures."""
    dot = Html(f'<span class="swatch" style="background:{LIGHT.colour(number)}"></span>')
    kind = "long" if len(name) > LONG_NAME else "name"
    shown = Html(f'<span class="{kind}">{text(name)}</span>')
    return Html(f'<span class="run">{dot}{shown}</span>')


def strategy_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The strategy's settings of a run's config.json; empty for GRPO."""
    return config["settings"].get("strategy") or {}


def _common_name(runs: Sequence[RunData]) -> str:
    first, last = min(run.name for run in runs), max(run.name for run in runs)
    alike = [a == b for a, b in zip(first, last, strict=False)]
    common = first[: (*alike, False).index(False)].rstrip("-_ ./0123456789")
    return common.removesuffix("seed").rstrip("-_ ./") or runs[0].method
