"""The section on sequences of `esfast continual`: each task as a share of its own peak, what later
stages took from it, and the scores after every stage.

It shows what continual.json says (esfast/continual/results.py has the definitions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esfast.continual.stages import CONTINUAL
from esfast.continual_plots import top_of
from esfast.errors import DataError
from esfast.html_report.drawing import (
    Series,
    Theme,
    curve,
    grid_of,
    legend_below,
    plain,
    whole_generations,
)
from esfast.html_report.page import DASH, Html, Section, number, paragraph, score, table
from esfast.html_report.pictures import Pictures
from esfast.html_report.run_data import RunData
from esfast.run_folder import CONFIG, read_json

DIFFERENCES = ("learned", "forward_transfer", "backward_transfer")


@dataclass(frozen=True)
class TaskChain:
    """One folder of `esfast continual`: its continual.json, and the stages' run folders so far."""

    name: str
    path: Path
    record: Mapping[str, Any]
    stages: tuple[Path, ...]


def is_chain(path: Path) -> bool:
    """Whether a folder is one of `esfast continual`."""
    return (path / CONTINUAL).is_file()


def read_chain(path: Path) -> TaskChain:
    """Raises DataError where continual.json is damaged or no stage has begun."""
    record = read_json(path / CONTINUAL)
    stages = tuple(sorted((p.parent for p in path.glob(f"stage-*/{CONFIG}")), key=_number))
    if "results" not in record or not stages:
        raise DataError(
            f"'{path}' has no results of stages in its {CONTINUAL}; give the folder of a sequence "
            "that esfast continual has begun, or single run folders."
        )
    return TaskChain(path.resolve().name, path, record, stages)


def _number(stage: Path) -> int:
    digits = stage.name.split("-")[1]
    return int(digits) if digits.isdigit() else 0


def sequences(chains: Sequence[TaskChain], runs: Sequence[RunData], pictures: Pictures) -> Section:
    """A picture and two tables a sequence, whose stages are among the runs; nothing without one."""
    section = Section("sequence", "One task after another")
    for place, chain in enumerate(chains):
        found = chain.record["results"].get("greedy")
        if not found:
            continue
        section.parts.append(_peaks(chain, found["tasks"], f"sequence_{place + 1}", pictures))
        section.parts.append(_transfer_table(chain, found["tasks"]))
        section.parts.append(_matrix_table(chain, found["matrix"]))
        section.parts += _not_scored(chain, runs)
    if section.parts:
        section.parts.append(
            paragraph(
                "Learned: rise over the task's own stage, from the start of the sequence, or of "
                "that stage where it was trained before. Forward transfer: what the stages before "
                "its own did to it; backward transfer: what those after it did, up to its next "
                "training; both with paired 95 % intervals. Forgetting: its peak minus its score "
                "then; a peak is the highest of noisy evaluations and lies above the truth."
            )
        )
    return section


def _not_scored(chain: TaskChain, runs: Sequence[RunData]) -> list[Html]:
    """Which stages' scores are in part the grader's; continual.json does not say."""
    said = [
        f"{run.name} {sum(score.failed for score in run.prior):,}"
        for run in runs
        if run.path in chain.stages and any(score.failed for score in run.prior)
    ]
    if not said:
        return []
    return [
        paragraph(
            f"{chain.name}: answers that could not be scored and count with the failure reward: "
            f"{', '.join(said)}. The section on prior tasks says of which and when."
        )
    ]


def _peaks(
    chain: TaskChain, tasks: Sequence[Mapping[str, Any]], name: str, pictures: Pictures
) -> Html:
    def draw(figure: Any, theme: Theme) -> None:
        (axes,) = grid_of(figure, 1, 1)
        for index, task in enumerate(tasks):
            curve(axes, _share(index, task, _label(task, tasks)), theme)
        for end in _ends(tasks):
            axes.axvline(end, color=theme.soft, linewidth=0.8, linestyle=":")
        axes.axhline(1.0, color=theme.soft, linewidth=0.6)
        axes.set(xlabel="generation, over all stages", ylabel="score / peak of its own stage",
                 title=plain(chain.name), ylim=(0, top_of(tasks)))  # fmt: skip
        whole_generations(axes)
        legend_below(figure)

    return pictures.add(
        name, draw, 3.6,
        "Greedy scores as shares of each task's peak in its own stage (prior tasks: of what they "
        "were before), with 95 % intervals over the prompts. Dotted: a stage ends.",
    )  # fmt: skip


def _label(task: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> str:
    """A task's name, with the stage where it was trained in several."""
    once = sum(other["task"] == task["task"] for other in tasks) == 1
    return str(task["task"]) if once else f"{task['task']} (stage {task['own_stage']})"


def _share(index: int, task: Mapping[str, Any], label: str) -> Series:
    points = [p for p in task["curve"] if p["of_peak"] is not None]
    return Series(
        label,
        index,
        [p["at"] for p in points],
        [p["of_peak"] for p in points],
        [p["of_peak_95"][0] for p in points],
        [p["of_peak_95"][1] for p in points],
        dashed=task["own_stage"] is None,
    )


def _ends(tasks: Sequence[Mapping[str, Any]]) -> list[int]:
    """Generations at which a stage ended and another went on."""
    ends: dict[int, int] = {}
    for task in tasks:
        for point in task["curve"]:
            ends[point["stage"]] = max(ends.get(point["stage"], 0), point["at"])
    return [ends[stage] for stage in sorted(ends)[:-1]]


def _transfer_table(chain: TaskChain, tasks: Sequence[Mapping[str, Any]]) -> Html:
    head = ("task", "stage", "learned", "forward transfer", "backward transfer", "forgetting",
            "kept of its peak")  # fmt: skip
    rows = [
        (
            task["task"],
            task["own_stage"],
            *(_difference(task.get(name)) for name in DIFFERENCES),
            score(task.get("forgetting"), sign=True),
            number(task.get("kept_of_peak")),
        )
        for task in tasks
        if task["own_stage"] is not None
    ]
    return table(head, rows, f"{chain.name}: transfer and forgetting, task by task.")


def _difference(part: Mapping[str, Any] | None) -> Html:
    return score(part["value"], part["value_95"], sign=True) if part else Html(DASH)


def _matrix_table(chain: TaskChain, matrix: Sequence[Mapping[str, Any]]) -> Html:
    names = list(dict.fromkeys(name for row in matrix for name in row["scores"]))
    rows = []
    for row in matrix:
        label = f"stage {row['after_stage']}: {row['trained']}" if row["trained"] else "before any"
        found = [row["scores"].get(name) for name in names]
        cells = [score(one["score"], one["score_95"]) if one else DASH for one in found]
        rows.append((label, *cells))
    return table(("after", *names), rows, f"{chain.name}: every task's score after each stage.")
