"""Means over runs that differ in their seed alone, with Student's 95 % intervals.

A mean is of values at one generation: the last that any of the runs has. Fewer runs than are
averaged elsewhere, or an earlier generation than the runs' last, is said beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from esfast.html_report.page import (
    DASH,
    Html,
    at_end,
    number,
    over,
    paragraph,
    score,
    table,
    unscored,
)
from esfast.html_report.report_data import Group, ReportData, student, swatch
from esfast.html_report.run_data import RunData
from esfast.prior.scores import outcome


@dataclass(frozen=True)
class Found:
    """One run's value, the generation it is of, and how many of its answers were not scored."""

    at: int
    value: float
    failed: int = 0


@dataclass(frozen=True)
class Change:
    """What became of a prior task's greedy score; fall: how much worse, whichever way that is."""

    task: str
    value: float
    interval: Sequence[float] | None
    fall: float
    at: int
    failed: int


def changes(run: RunData) -> list[Change]:
    """Of every prior task that was evaluated since training began."""
    found = []
    for task in run.prior_tasks:
        scores = run.prior_of(task)
        if len(scores) < 2:
            continue
        last, part = scores[-1], outcome(scores)["greedy"]
        change = part["change"]
        fall = -change if last.higher_is_better else change
        failed = scores[0].failed + last.failed
        found.append(Change(task, change, part["change_95"], fall, last.generation, failed))
    return found


def seeds_parts(report: ReportData) -> list[Html]:
    """The table of means, and which runs are no part of them."""
    parts = [_seeds_table(report)] if report.seeds else []
    for group in report.groups:
        if group.left_out:
            said = f"{group.label}: curves and means leave out {', '.join(group.left_out)}."
            parts.append(paragraph(said))
    return parts


def _seeds_table(report: ReportData) -> Html:
    rows = [
        (
            swatch(group.number, group.label),
            len(group.averaged),
            _at_last(_finals(group), group),
            _at_last(_rises(group), group, sign=True),
            _largest_fall(group),
            _at_last(_norms(group), group, digits=3),
        )
        for group in report.groups
    ]
    head = ("runs that differ in their seed", "seeds", "target final", "rise",
            "largest fall of a prior task", "norm of the change")  # fmt: skip
    said = ("Means over seeds with Student's 95 % intervals; with three seeds the interval is 4.3 "
            "standard errors wide to each side. A fall is one task's, averaged over the "
            "seeds. ")  # fmt: skip
    return table(head, rows, said + picked(report))


def picked(report: ReportData) -> str:
    """What a caption says of the interval of a largest fall."""
    count = max((len(changes(run)) for run in report.runs), default=0)
    if count < 2:
        return ""
    return (
        f"The largest fall is the worst of {count} tasks, picked after looking: its interval does "
        "not cover 95 %. "
    )


def _finals(group: Group) -> list[Found]:
    finals = [run.final for run in group.averaged if run.final]
    return [Found(r["generation"], r["score"], r.get("failed_rewards", 0)) for r in finals]


def _rises(group: Group) -> list[Found]:
    return [
        Found(run.final["generation"], run.final["score"] - run.before["score"])
        for run in group.averaged
        if run.final and run.before
    ]


def _norms(group: Group) -> list[Found]:
    ends = [run.subject.last for run in group.averaged if run.subject and run.subject.last]
    return [
        Found(group.generations if end["generation"] is None else end["generation"],
              float(end["whole"]["norm"]))
        for end in ends
    ]  # fmt: skip


def _largest_fall(group: Group) -> Html | str:
    """Of the task whose mean over the seeds fell most: the seeds' own largest falls are of other
    tasks each, and their mean is below zero where nothing fell."""
    tasks: dict[str, list[Change]] = {}
    for run in group.averaged:
        for change in changes(run):
            tasks.setdefault(change.task, []).append(change)
    if not tasks:
        return DASH
    worst = max(tasks, key=lambda task: float(np.mean([change.fall for change in tasks[task]])))
    found = [Found(change.at, change.value, change.failed) for change in tasks[worst]]
    return over(_at_last(found, group, sign=True), worst_of(worst, len(tasks)))


def worst_of(task: str, count: int) -> str:
    """A task's name, and of how many it was picked."""
    return task if count == 1 else f"{task}, worst of {count}"


def _at_last(found: list[Found], group: Group, sign: bool = False, digits: int = 0) -> Html | str:
    """A mean, with its generation where that is not the group's last."""
    at = max((one.at for one in found), default=None)
    return at_end(over_seeds(found, group, sign, digits), at, group.generations)


def over_seeds(found: list[Found], group: Group, sign: bool = False, digits: int = 0) -> Html | str:
    """Mean and interval of the values of the latest generation; a dash for none."""
    kept = [one for one in found if one.at == max(one.at for one in found)]
    if not kept:
        return DASH
    shown = unscored(
        _mean([one.value for one in kept], sign, digits), sum(one.failed for one in kept)
    )
    fewer = len(kept) < len(group.averaged)
    return over(shown, f"{len(kept)} of {len(group.averaged)} seeds") if fewer else shown


def _mean(values: Sequence[float], sign: bool, digits: int) -> Html | str:
    mean, low, high = student(values)
    if digits:
        shown = number(mean, digits)
        return shown if len(values) < 2 else over(shown, f"[{number(low)}, {number(high)}]")
    return score(mean, (low, high) if len(values) > 1 else None, sign)
