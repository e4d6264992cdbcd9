"""Sections on the target: its score by generation, answers before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esfast.html_report.drawing import (
    Theme,
    curve,
    grid_of,
    legend_below,
    whole_generations,
)
from esfast.html_report.page import (
    DASH,
    Html,
    Section,
    at_generations,
    joined,
    paragraph,
    table,
    text,
)
from esfast.html_report.pictures import Pictures
from esfast.html_report.report_data import Points, ReportData
from esfast.html_report.run_data import RunData

PROMPTS_SHOWN = 4


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

        bands = report.bands(
            "left, 95 % intervals over the held-out prompts; right, a standard deviation over the "
            "population (of GRPO, within a group)"
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
    section.parts += [paragraph(said) for run in report.runs if (said := _not_scored(run))]
    section.lacks("held-out scores", [run for run in report.runs if not run.held_out])
    return section


def _not_scored(run: RunData) -> str | None:
    """At which generations answers counted with the failure reward."""
    parts = []
    for what, records in (("held-out", run.held_out), ("of training", run.rows)):
        failed = {r["generation"]: n for r in records if (n := r.get("failed_rewards", 0))}
        parts += [f"{what} {at_generations(failed)}"] if failed else []
    if not parts:
        return None
    return (
        f"{run.name}: answers that could not be scored and count with the failure reward, in the "
        f"curves too: {'; '.join(parts)}."
    )


def _score_points(run: RunData) -> Points:
    records = run.held_out
    return Points(
        [r["generation"] for r in records],
        [r["score"] for r in records],
        [r["score_95"][0] for r in records],
        [r["score_95"][1] for r in records],
    )


def _reward_points(run: RunData) -> Points:
    means = [row["reward_mean"] for row in run.rows]
    spreads = [row["reward_spread"] for row in run.rows]
    return Points(
        [row["generation"] for row in run.rows],
        means,
        [mean - spread for mean, spread in zip(means, spreads, strict=True)],
        [mean + spread for mean, spread in zip(means, spreads, strict=True)],
    )


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
    section.lacks("answers", [run for run in runs if not run.samples])
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


def _soft(value: str) -> Html:
    return Html(f'<span class="soft">{text(value)}</span>')
