"""The section on prompts that evolved beside the weights: each cycle's, and what they score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esfast.fast_slow.cycles import HELD_OUT_PROMPT, Cycle
from esfast.html_report.page import (
    DASH,
    Html,
    Section,
    joined,
    number,
    paragraph,
    score,
    table,
    text,
)
from esfast.html_report.report_data import ReportData
from esfast.html_report.run_data import RunData


def prompts(report: ReportData) -> Section:
    """Of each fast-slow run the instructions kept in each cycle, and both held-out scores."""
    section = Section("prompts", "Prompts that evolved beside the weights")
    for run in report.runs:
        if run.cycles:
            section.parts += [_prompts_table(report, run), _scores_table(report, run)]
    if section.parts:
        section.parts.append(
            paragraph(
                "Under the first instruction only the weights move the score; the best prompt adds "
                "what is in the prompt. Which is the best is chosen on problems of training."
            )
        )
    return section


def _prompts_table(report: ReportData, run: RunData) -> Html:
    """The first instruction and the kept ones; the others of the pool are in prompts.jsonl."""
    rows = [row for cycle in run.cycles for row in _cycle_rows(cycle)]
    spent = "; ".join(
        f"cycle {cycle.cycle + 1}: {len(cycle.candidates)} candidates, {cycle.metric_calls} metric "
        f"calls, {cycle.reflections} reflections, {cycle.seconds:.0f} s"
        for cycle in run.cycles
    )
    caption = joined([report.named(run), f": instructions before each problem. {spent}."])
    head = ("cycle", "instruction", "score", "best on", "kept")
    return table(head, rows, caption, kind="words")


def _cycle_rows(cycle: Cycle) -> list[Sequence[object]]:
    shown = [c for at, c in enumerate(cycle.candidates) if c.kept or at == 0]
    return [
        (
            cycle.cycle + 1,
            Html(f"<pre>{text(candidate.text)}</pre>"),
            number(candidate.score),
            f"{candidate.best_on} of {cycle.scored_on}",
            "kept" if candidate.kept else "first instruction, not kept",
        )
        for candidate in shown
    ]


def _scores_table(report: ReportData, run: RunData) -> Html:
    first = {record["generation"]: record for record in run.held_out}
    best = {r["generation"]: r for row in run.rows if (r := row.get(HELD_OUT_PROMPT))}
    searched = {cycle.generation: cycle.held_out for cycle in run.cycles if cycle.held_out}
    generations = sorted({*first, *best, *searched})
    rows = [
        (at, *(_score(found.get(at)) for found in (first, best, searched))) for at in generations
    ]
    head = ("generation", "first instruction", "best prompt of the cycle so far",
            "best prompt of the cycle that begins")  # fmt: skip
    return table(head, rows, joined([report.named(run), ": held-out scores with 95 % intervals."]))


def _score(record: Mapping[str, Any] | None) -> Html | str:
    return DASH if record is None else score(record["score"], record["score_95"])
