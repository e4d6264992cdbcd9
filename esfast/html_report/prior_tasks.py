"""The section on prior tasks: a panel and a table a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from esfast.html_report.drawing import (
    Theme,
    curve,
    grid_of,
    legend_below,
    plain,
    whole_generations,
)
from esfast.html_report.page import (
    DASH,
    Html,
    Section,
    at_end,
    at_generations,
    code,
    joined,
    over,
    paragraph,
    score,
    table,
    unscored,
)
from esfast.html_report.pictures import Pictures
from esfast.html_report.report_data import Group, Points, ReportData, swatch
from esfast.html_report.run_data import RunData
from esfast.html_report.seeds import Found, over_seeds
from esfast.prior.scores import KINDS, PriorScore, outcome


def prior(report: ReportData, pictures: Pictures) -> Section:
    """A panel and a table a prior task; never an average over tasks."""
    section = Section("prior", "Prior tasks: what was forgotten, and what came back")
    tasks = list(dict.fromkeys(task for run in report.runs for task in run.prior_tasks))
    if tasks:
        section.parts.append(_prior_picture(report, pictures, tasks))
        section.parts += [part for task in tasks for part in _task_parts(report, task)]
        section.parts.append(
            paragraph(
                "Dip: worst minus before. Change: final minus before. Recovery: final minus "
                "worst. Intervals are 95 %, paired over prompts. The worst of many noisy "
                "evaluations lies lower than the truth, and its recovery higher."
            )
        )
    flags = "--prior-tasks gsm8k,hellaswag --prior-every 5 ... (a new run)"
    bare = [run for run in report.runs if not run.prior]
    section.lacks("scores of prior tasks", bare, lambda run: f"esfast {run.command} {flags}")
    return section


def _prior_picture(report: ReportData, pictures: Pictures, tasks: list[str]) -> Html:
    def draw(figure: Any, theme: Theme) -> None:
        panels = grid_of(figure, len(tasks), 3)
        for axes, task in zip(panels, tasks, strict=True):
            for kind in KINDS:
                for series in report.series(partial(_prior_points, task=task, kind=kind)):
                    dashed = kind == "sampled"
                    label = "" if dashed else series.label  # one legend line for both
                    curve(axes, replace(series, label=label, dashed=dashed), theme)
            axes.set(title=plain(task.rsplit("/", 1)[-1]), xlabel="generation", ylabel="score")
            whole_generations(axes)
        legend_below(figure)

    rows = -(-len(tasks) // 3)
    return pictures.add(
        "prior_tasks", draw, 0.5 + 2.5 * rows,
        "Score of each prior task under the tuned weights: solid lines greedy answers, dashed ones "
        "the mean of several samples a prompt. "
        + report.bands("95 % intervals over the prompts"),
    )  # fmt: skip


def _prior_points(run: RunData, task: str, kind: str) -> Points:
    found = [(s.generation, estimate) for s in run.prior_of(task)
             if (estimate := getattr(s, kind)) is not None]  # fmt: skip
    return Points(
        [generation for generation, _ in found],
        [estimate.score for _, estimate in found],
        [estimate.low for _, estimate in found],
        [estimate.high for _, estimate in found],
    )


def _task_parts(report: ReportData, task: str) -> list[Html]:
    """A task's table, and a line for each run whose scores are in part the grader's."""
    outages = [_outage(run, task) for run in report.runs]
    return [_prior_table(report, task), *(paragraph(said) for said in outages if said)]


def _outage(run: RunData, task: str) -> str | None:
    """Which of the evaluations that a change is read from had answers that were not scored."""
    scores = run.prior_of(task)
    failed = {s.generation: s.failed for s in scores if s.failed}
    if not failed:
        return None
    parts = [part for kind in KINDS if (part := outcome(scores)[kind])]
    read = {when: {part[f"{when}_generation"] for part in parts}
            for when in ("before", "worst", "final")}  # fmt: skip
    hit = [when for when, there in read.items() if there & failed.keys()]
    where = f" (in {', '.join(hit)})" if hit else ""
    return (
        f"{task}, {run.name}: answers that could not be scored: {at_generations(failed)}{where}. "
        "They count with the failure reward, so that a fall there may be the grader's; intervals "
        "do not know of it."
    )


def _prior_table(report: ReportData, task: str) -> Html:
    rows: list[Sequence[object]] = []
    for run in report.runs:
        scores = run.prior_of(task)
        if scores:
            rows += _prior_rows(report, run, scores)
    rows += [_prior_seeds(group, task) for group in report.groups if _several(group, task)]
    metric = next(s for run in report.runs for s in run.prior_of(task))
    better = "" if metric.higher_is_better else "; lower is better"
    head = ("run", "answers", "before", "worst, at generation", "final", "dip", "change",
            "recovery")  # fmt: skip
    caption = joined([code(task), f": {metric.metric}, {metric.prompts} prompts{better}",
                      _said_of_failed(report, task)])  # fmt: skip
    return table(head, rows, caption)


def _said_of_failed(report: ReportData, task: str) -> str:
    if not any(s.failed for run in report.runs for s in run.prior_of(task)):
        return ""
    return "; not scored: of the greedy and the sampled answers together"


def _several(group: Group, task: str) -> bool:
    return sum(len(run.prior_of(task)) > 1 for run in group.averaged) > 1


def _prior_seeds(group: Group, task: str) -> Sequence[object]:
    """Means over seeds with Student's intervals; greedy answers."""
    runs = [run.prior_of(task) for run in group.averaged if len(run.prior_of(task)) > 1]
    cells = []
    for name in ("before", "worst", "final", "dip", "change", "recovery"):
        found = [_of_outcome(scores, name) for scores in runs]
        cells.append(over_seeds(found, group, sign=name in ("dip", "change", "recovery")))
    end = max(scores[-1].generation for scores in runs)
    return (swatch(group.number, group.label), at_end("greedy, mean", end, group.generations),
            *cells)  # fmt: skip


def _of_outcome(scores: Sequence[PriorScore], name: str) -> Found:
    """A number of one run's outcome; of the generation that the run's was last evaluated at."""
    part = outcome(scores)["greedy"]
    failed = {s.generation: s.failed for s in scores}
    return Found(scores[-1].generation, part[name], failed.get(part.get(f"{name}_generation"), 0))


def _prior_rows(
    report: ReportData, run: RunData, scores: Sequence[PriorScore]
) -> list[Sequence[object]]:
    parts = outcome(scores)
    failed = {s.generation: s.failed for s in scores}
    rows: list[Sequence[object]] = []
    for kind in KINDS:
        part = parts[kind]
        if part is None:
            continue
        if part["final_generation"] == part["before_generation"]:  # nothing since
            before = unscored(score(part["before"], part["before_95"]), scores[0].failed)
            rows.append((report.named(run), kind, before, *[DASH] * 5))
            continue
        rows.append(
            (
                report.named(run),
                kind,
                *(
                    unscored(shown, failed[part[f"{when}_generation"]])
                    for when, shown in (
                        ("before", score(part["before"], part["before_95"])),
                        ("worst", _worst(part)),
                        ("final", _final(part, run)),
                    )
                ),
                *(score(part[n], part[f"{n}_95"], sign=True)
                  for n in ("dip", "change", "recovery")),
            )
        )  # fmt: skip
    return rows


def _final(part: Mapping[str, Any], run: RunData) -> Html | str:
    shown = score(part["final"], part["final_95"])
    return at_end(shown, part["final_generation"], run.generations)


def _worst(part: Mapping[str, Any]) -> Html:
    low, high = part["worst_95"]
    at = f"[{low:.3f}, {high:.3f}] at {part['worst_generation']}"
    return over(f"{part['worst']:.3f}", at)
