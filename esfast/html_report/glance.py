"""The comparison at a glance: a row a run, and one a group of seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esfast.html_report.account import resume_command
from esfast.html_report.page import (
    DASH,
    Html,
    Section,
    at_end,
    number,
    over,
    score,
    seconds,
    table,
    unscored,
)
from esfast.html_report.report_data import ReportData
from esfast.html_report.run_data import RunData
from esfast.html_report.seeds import changes, picked, seeds_parts, worst_of

CAPTION = (
    "Scores with 95 % intervals over the held-out prompts; rises also in standard errors (s.e.) of "
    "the paired difference; falls of prior tasks paired over their prompts, final against before. "
    "{picked}"
    "Failed rewards: answers of training that could not be scored; below, those of held-out "
    "prompts and prior tasks. Each counts with its task's failure reward."
)


def glance(report: ReportData) -> Section:
    """The comparison: a row a run, and one a group of seeds."""
    section = Section("glance", "At a glance")
    head = (
        "run", "method", "generations", "target before", "target final",
        "rise", "largest fall of a prior task", "norm of the change", "failed rewards",
        "wall time",
    )  # fmt: skip
    section.parts.append(
        table(
            head,
            [_glance_row(report, run) for run in report.runs],
            CAPTION.format(picked=picked(report)),
        )
    )
    section.parts += seeds_parts(report)
    bare = [run for run in report.runs if run.held_out and run.before is None]
    section.lacks("the held-out score before training", bare, resume_command)
    return section


def _glance_row(report: ReportData, run: RunData) -> Sequence[object]:
    spent = (run.summary or {}).get("seconds")
    return (
        report.named(run),
        run.method,
        _generations(run),
        _held_out(run.before),
        at_end(_held_out(run.final), run.final["generation"], run.generations)
        if run.final
        else DASH,
        _rise(run),
        _largest_fall(run),
        _norm(run),
        _failed(run),
        seconds(sum(spent.values()) if spent else None),
    )


def _generations(run: RunData) -> str | Html:
    wanted = run.config["settings"].get("generations", 0)
    return (
        over(run.generations, f"of {wanted}") if run.generations < wanted else str(run.generations)
    )


def _rise(run: RunData) -> str | Html:
    """From before to final; in standard errors where the summary's rise is the same."""
    if run.before is None or run.final is None:
        return DASH
    rise, summary = f"{run.final['score'] - run.before['score']:+.3f}", run.summary or {}
    same = (summary.get("held_out_after") or {}).get("generation") == run.final["generation"]
    errors = summary.get("rise_in_standard_errors") if same else None
    return over(rise, f"{errors:.1f} s.e.") if errors is not None else rise


def _held_out(record: Mapping[str, Any] | None) -> str | Html:
    if record is None:
        return DASH
    return unscored(score(record["score"], record["score_95"]), record.get("failed_rewards", 0))


def _failed(run: RunData) -> str | Html:
    trained = DASH if run.failed_rewards is None else f"{run.failed_rewards:,}"
    held_out = sum(record.get("failed_rewards", 0) for record in run.held_out)
    prior = sum(score.failed for score in run.prior)
    shown: str | Html = trained
    for count, what in ((held_out, "held-out"), (prior, "prior tasks")):
        shown = over(shown, f"{what} {count:,}") if count else shown
    return shown


def _norm(run: RunData) -> str | Html:
    last = run.subject.last if run.subject else None
    if last is None:
        return DASH
    return at_end(number(float(last["whole"]["norm"])), last["generation"], run.generations)


def _largest_fall(run: RunData) -> Html | str:
    found = changes(run)
    if not found:
        return DASH
    worst = max(found, key=lambda change: change.fall)
    named = worst_of(worst.task, len(found))
    shown = over(score(worst.value, worst.interval, sign=True), named)
    return at_end(unscored(shown, worst.failed), worst.at, run.generations)
