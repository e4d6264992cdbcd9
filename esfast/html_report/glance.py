"""The comparison at a glance: a row a run, and means over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esfast.html_report.account import resume_command
from esfast.html_report.page import (
    DASH,
    Html,
    Missing,
    Section,
    at_end,
    number,
    over,
    score,
    seconds,
    table,
    unscored,
)
from esfast.html_report.report_data import ReportData, student, swatch
from esfast.html_report.run_data import RunData
from esfast.prior.scores import outcome

CAPTION = (
    "Scores with 95 % intervals over the held-out prompts; rises also in standard errors (s.e.) of "
    "the paired difference; falls of prior tasks paired over their prompts, final against before. "
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
            CAPTION,
        )
    )
    if report.seeds:
        section.parts.append(_seeds_table(report))
    section.missing += [
        Missing(run.name, "the held-out score before training", resume_command(run))
        for run in report.runs
        if run.held_out and run.before is None
    ]
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
        _norm_cell(run),
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
    counts = ((held_out, "held-out"), (prior, "of prior tasks"))
    apart = ", ".join(f"{count:,} {what}" for count, what in counts if count)
    return over(trained, apart) if apart else trained


def _norm_cell(run: RunData) -> str | Html:
    last = run.subject.last if run.subject else None
    at = None if last is None else last["generation"]  # a checkpoint has none
    return at_end(number(_norm(run)), at, run.generations)


def _norm(run: RunData) -> float | None:
    last = run.subject.last if run.subject else None
    return None if last is None else float(last["whole"]["norm"])


def _falls(run: RunData) -> list[tuple[float, Sequence[float] | None, str]]:
    """(change of a greedy score, its interval, task), worst first; a rise where lower is better
    counts as a fall."""
    found = []
    for task in run.prior_tasks:
        scores = run.prior_of(task)
        if len(scores) < 2:  # before training alone
            continue
        part = outcome(scores)
        sign = 1.0 if part["higher_is_better"] else -1.0
        change = part["greedy"]["change"]
        found.append((sign * change, (change, part["greedy"]["change_95"], task)))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


def _largest_fall(run: RunData) -> Html | str:
    falls = _falls(run)
    if not falls:
        return DASH
    change, interval, task = falls[0]
    scores = run.prior_of(task)
    shown = over(score(change, interval, sign=True), task)
    last = scores[-1]
    return at_end(unscored(shown, scores[0].failed + last.failed), last.generation, run.generations)


def _seeds_table(report: ReportData) -> Html:
    rows = []
    for group in report.groups:
        finals = [run.final["score"] for run in group.runs if run.final]
        rises = [
            run.final["score"] - run.before["score"]
            for run in group.runs
            if run.final and run.before
        ]
        norms = [norm for run in group.runs if (norm := _norm(run)) is not None]
        falls = [found[0][0] for run in group.runs if (found := _falls(run))]
        rows.append(
            (
                swatch(group.number, group.label),
                len(group.runs),
                over_seeds(finals),
                over_seeds(rises, sign=True),
                over_seeds(falls, sign=True),
                over_seeds(norms, digits=3),
            )
        )
    head = ("runs that differ in their seed", "seeds", "target final", "rise",
            "largest fall of a prior task", "norm of the change")  # fmt: skip
    return table(head, rows, "Means over seeds with Student's 95 % intervals; with three seeds "
                 "the interval is 4.3 standard errors wide to each side.")  # fmt: skip


def over_seeds(values: Sequence[float], sign: bool = False, digits: int = 0) -> str | Html:
    """Mean and Student's interval."""
    if not values:
        return DASH
    mean, low, high = student(values)
    if digits:
        shown = number(mean, digits)
        return shown if len(values) < 2 else over(shown, f"[{number(low)}, {number(high)}]")
    return score(mean, (low, high) if len(values) > 1 else None, sign)
