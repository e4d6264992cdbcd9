"""Sections on what training did: at a glance, the target's score, prior tasks, answers."""

from __future__ import annotations

import math
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
    Missing,
    Section,
    code,
    joined,
    number,
    over,
    paragraph,
    score,
    seconds,
    table,
    text,
)
from esfast.html_report.pictures import Pictures
from esfast.html_report.report_data import Group, Points, ReportData, student, swatch
from esfast.html_report.run_data import RunData
from esfast.prior.scores import KINDS, PriorScore, outcome

PROMPTS_SHOWN = 4
NONE_BUT_A_NEW_RUN = None


def glance(report: ReportData) -> Section:
    """The comparison: a row a run, and one a group of seeds."""
    section = Section("glance", "At a glance")
    head = (
        "run", "method", "generations", "target before", "target final",
        "rise", "largest fall of a prior task", "norm of the change",
        "wall time",
    )  # fmt: skip
    section.parts.append(
        table(
            head,
            [_glance_row(report, run) for run in report.runs],
            "Scores with 95 % intervals over the held-out prompts; rises also in standard errors "
            "(s.e.) of the paired difference; falls of prior tasks paired "
            "over their prompts, final against before.",
        )
    )
    if report.seeds:
        section.parts.append(_seeds_table(report))
    return section


def _glance_row(report: ReportData, run: RunData) -> Sequence[object]:
    summary = run.summary or {}
    first, last = (run.held_out[0], run.held_out[-1]) if run.held_out else (None, None)
    rise = summary.get("rise")
    errors = summary.get("rise_in_standard_errors")
    spent = summary.get("seconds")
    return (
        report.named(run),
        run.method,
        summary.get("generations", len(run.rows)),
        _held_out(first),
        _held_out(last),
        DASH if rise is None else over(f"{rise:+.3f}", f"{_finite(errors)} s.e."),
        _largest_fall(run),
        number(_norm(run)),
        seconds(sum(spent.values()) if spent else None),
    )


def _finite(value: float | None) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{value:.1f}"


def _held_out(record: Mapping[str, Any] | None) -> str | Html:
    return DASH if record is None else score(record["score"], record["score_95"])


def _norm(run: RunData) -> float | None:
    last = run.subject.last if run.subject else None
    return None if last is None else float(last["whole"]["norm"])


def _falls(run: RunData) -> list[tuple[float, Sequence[float] | None, str]]:
    """(change of a greedy score, its interval, task), worst first; a rise where lower is better
    counts as a fall."""
    found = []
    for task in run.prior_tasks:
        part = outcome(run.prior_of(task))
        sign = 1.0 if part["higher_is_better"] else -1.0
        change = part["greedy"]["change"]
        found.append((sign * change, (change, part["greedy"]["change_95"], task)))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


def _largest_fall(run: RunData) -> Html | str:
    falls = _falls(run)
    if not falls:
        return DASH
    change, interval, task = falls[0]
    return joined([score(change, interval, sign=True), Html('<span class="below">'), task,
                   Html("</span>")])  # fmt: skip


def _soft(value: str) -> Html:
    return Html(f'<span class="soft">{text(value)}</span>')


def _seeds_table(report: ReportData) -> Html:
    rows = []
    for group in report.groups:
        finals = [run.held_out[-1]["score"] for run in group.runs if run.held_out]
        rises = [
            run.held_out[-1]["score"] - run.held_out[0]["score"]
            for run in group.runs
            if run.held_out
        ]
        norms = [norm for run in group.runs if (norm := _norm(run)) is not None]
        falls = [found[0][0] for run in group.runs if (found := _falls(run))]
        rows.append(
            (
                swatch(group.number, group.label),
                len(group.runs),
                _over_seeds(finals),
                _over_seeds(rises, sign=True),
                _over_seeds(falls, sign=True),
                _over_seeds(norms, digits=3),
            )
        )
    head = ("runs that differ in their seed", "seeds", "target final", "rise",
            "largest fall of a prior task", "norm of the change")  # fmt: skip
    return table(head, rows, "Means over seeds with Student's 95 % intervals; with three seeds "
                 "the interval is 4.3 standard errors wide to each side.")  # fmt: skip


def _over_seeds(values: Sequence[float], sign: bool = False, digits: int = 0) -> str | Html:
    if not values:
        return DASH
    mean, low, high = student(values)
    if digits:
        shown = number(mean, digits)
        return shown if len(values) < 2 else over(shown, f"[{number(low)}, {number(high)}]")
    return score(mean, (low, high) if len(values) > 1 else None, sign)


# --- the target ----------------------------------------------------------------------------------


def target(report: ReportData, pictures: Pictures) -> Section:
    """Held-out score and training reward by generation."""
    section = Section("target", "Target score")
    held_out = report.series(_score_points)
    rewards = report.series(_reward_points)
    if held_out or rewards:

        def draw(figure: Any, theme: Theme) -> None:
            left, right = grid_of(figure, 2, 2)
            for series in held_out:
                curve(left, series, theme)
            for series in rewards:
                curve(right, series, theme)
            left.set(title="Held-out prompts", xlabel="generation", ylabel="score")
            right.set(title="Training reward", xlabel="generation", ylabel="reward")
            for axes in (left, right):
                whole_generations(axes)
            legend_below(figure)

        bands = (
            "Lines: mean over seeds; bands: their range; a group of one run has the band below."
            if report.seeds
            else "Bands: left, 95 % intervals over the held-out prompts; right, a standard "
            "deviation over the population (of GRPO, within a group)."
        )
        section.parts.append(
            pictures.add(
                "target",
                draw,
                3.5,
                f"Greedy answers to held-out prompts, and the mean "
                f"reward of the members that were trained on. {bands}",
            )
        )
    section.missing += [
        Missing(run.name, "held-out scores", NONE_BUT_A_NEW_RUN)
        for run in report.runs
        if not run.held_out
    ]
    return section


def _score_points(run: RunData) -> Points | None:
    records = run.held_out
    return Points(
        [r["generation"] for r in records],
        [r["score"] for r in records],
        [r["score_95"][0] for r in records],
        [r["score_95"][1] for r in records],
    )


def _reward_points(run: RunData) -> Points | None:
    means = [row["reward_mean"] for row in run.rows]
    spreads = [row["reward_spread"] for row in run.rows]
    return Points(
        [row["generation"] for row in run.rows],
        means,
        [mean - spread for mean, spread in zip(means, spreads, strict=True)],
        [mean + spread for mean, spread in zip(means, spreads, strict=True)],
    )


# --- prior tasks ---------------------------------------------------------------------------------


def prior(report: ReportData, pictures: Pictures) -> Section:
    """A panel and a table a prior task; never an average over tasks."""
    section = Section("prior", "Prior tasks: what was forgotten, and what came back")
    tasks = list(dict.fromkeys(task for run in report.runs for task in run.prior_tasks))
    if tasks:
        section.parts.append(_prior_picture(report, pictures, tasks))
        section.parts += [_prior_table(report, task) for task in tasks]
        section.parts.append(
            paragraph(
                "Dip: worst minus before. Change: final minus before. Recovery: final minus "
                "worst. Intervals are 95 %, paired over prompts. The worst of many noisy "
                "evaluations lies lower than the truth, and its recovery higher."
            )
        )
    section.missing += [
        Missing(
            run.name,
            "scores of prior tasks",
            f"esfast {_trainer(run)} --prior-tasks gsm8k,hellaswag --prior-every 5 ... (a new run)",
        )
        for run in report.runs
        if not run.prior
    ]
    return section


def _trainer(run: RunData) -> str:
    return "grpo" if run.method == "GRPO" else "train"


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
        + ("Lines are means over seeds, bands their range." if report.seeds
           else "Bands: 95 % intervals over the prompts."),
    )  # fmt: skip


def _prior_points(run: RunData, task: str, kind: str) -> Points | None:
    found = [(s.generation, estimate) for s in run.prior_of(task)
             if (estimate := getattr(s, kind)) is not None]  # fmt: skip
    return Points(
        [generation for generation, _ in found],
        [estimate.score for _, estimate in found],
        [estimate.low for _, estimate in found],
        [estimate.high for _, estimate in found],
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
    caption = joined([code(task), f": {metric.metric}, {metric.prompts} prompts{better}"])
    return table(head, rows, caption)


def _several(group: Group, task: str) -> bool:
    return sum(bool(run.prior_of(task)) for run in group.runs) > 1


def _prior_seeds(group: Group, task: str) -> Sequence[object]:
    """Means over seeds with Student's intervals; greedy answers."""
    parts = [outcome(scores)["greedy"] for run in group.runs if (scores := run.prior_of(task))]
    signs = {"before": False, "worst": False, "final": False,
             "dip": True, "change": True, "recovery": True}  # fmt: skip
    means = [_over_seeds([part[name] for part in parts], sign) for name, sign in signs.items()]
    return (swatch(group.number, group.label), "greedy, mean", *means)


def _prior_rows(
    report: ReportData, run: RunData, scores: Sequence[PriorScore]
) -> list[Sequence[object]]:
    parts = outcome(scores)
    rows: list[Sequence[object]] = []
    for kind in KINDS:
        part = parts[kind]
        if part is None:
            continue
        rows.append(
            (
                report.named(run),
                kind,
                score(part["before"], part["before_95"]),
                _worst(part),
                score(part["final"], part["final_95"]),
                *(score(part[n], part[f"{n}_95"], sign=True)
                  for n in ("dip", "change", "recovery")),
            )
        )  # fmt: skip
    return rows


def _worst(part: Mapping[str, Any]) -> Html:
    low, high = part["worst_95"]
    at = f"[{low:.3f}, {high:.3f}] at {part['worst_generation']}"
    return over(f"{part['worst']:.3f}", at)


# --- answers -------------------------------------------------------------------------------------


def answers(report: ReportData) -> Section:
    """The same prompts before and after; one run of each group."""
    section = Section("answers", "Answers before and after")
    runs = [group.runs[0] for group in report.groups]
    prompts: dict[str, list[tuple[RunData, Mapping[str, Any]]]] = {}
    for run in runs:
        for sample in run.samples[:PROMPTS_SHOWN]:
            prompts.setdefault(_prompt(sample["prompt"]), []).append((run, sample))
    for prompt, entries in prompts.items():
        rows = [(report.named(run), _answer(sample, "before"), _answer(sample, "after"))
                for run, sample in entries]  # fmt: skip
        caption = Html(f"<pre>{text(prompt)}</pre>")
        section.parts.append(table(("run", "before", "after"), rows, caption, kind="words"))
    section.missing += [
        Missing(run.name, "answers", NONE_BUT_A_NEW_RUN) for run in runs if not run.samples
    ]
    return section


def _prompt(prompt: object) -> str:
    if isinstance(prompt, list):
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
    return str(prompt)


def _answer(sample: Mapping[str, Any], when: str) -> Html:
    found = sample.get(when)
    if not found:
        return Html(DASH)
    said = f"score {found['score']:.3g}, generation {found['generation']}"
    answer = Html(f"<pre>{text(found['answer'])}</pre>") if found["answer"] else "empty, "
    return joined([answer, _soft(said)])
