"""The pictures of a sequence of tasks, drawn from its folder alone.

plots/curves.png    every task as a share of its own stage's peak, over all generations
plots/matrix.png    scores of every task after every stage
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from esfast.continual.stages import CONTINUAL
from esfast.plots import picture
from esfast.prior.scores import KINDS
from esfast.provenance import one_line
from esfast.run_folder import PLOTS, read_json

COLOURS = ("#27465f", "#c4572e", "#4f8a5b", "#8a5a9e", "#b8902c", "#4a90a4", "#8c4a4a", "#666666")


def draw_continual(folder: Path) -> list[Path]:
    """Draws what continual.json has; returns the pictures written.

    Raises ConfigError without matplotlib, DataError where `folder` is no sequence.
    """
    found = read_json(folder / CONTINUAL)
    made = one_line(found["made"])
    there = [kind for kind in KINDS if found["results"][kind] is not None]
    if not there:
        return []
    (folder / PLOTS).mkdir(exist_ok=True)
    ends = list(accumulate(found["generations"]))
    curves: list[Callable[[Any], None]] = []
    for kind in there:
        tasks = found["results"][kind]["tasks"]
        curves.append(partial(_curves, tasks=tasks, names=found["tasks"], ends=ends, kind=kind))
    matrices: list[Callable[[Any], None]] = [
        partial(_matrix, matrix=found["results"][kind]["matrix"], kind=kind) for kind in there
    ]
    paths = [folder / PLOTS / "curves.png", folder / PLOTS / "matrix.png"]
    picture(paths[0], curves, made)
    picture(paths[1], matrices, made)
    return paths


def _curves(
    axes: Any,
    tasks: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    ends: Sequence[int],
    kind: str,
) -> None:
    shown = [task for task in tasks if (task["peak"] or 0.0) > 0]
    named = [task["task"] for task in tasks]
    for number, task in enumerate(shown):
        colour, own = COLOURS[number % len(COLOURS)], task["own_stage"]
        at = [point["at"] for point in task["curve"]]
        low, high = zip(*(point["of_peak_95"] for point in task["curve"]), strict=True)
        axes.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)
        again = f" (stage {own})" if named.count(task["task"]) > 1 else ""
        peak = f"{task['peak']:.2f} " + ("at its peak" if own else "before")
        line = "-" if own else "--"
        values = [point["of_peak"] for point in task["curve"]]
        axes.plot(
            at,
            values,
            line,
            color=colour,
            label=f"{task['task']}{again}: {peak}",
            marker="o",
            markersize=3,
        )
    for number, (end, name) in enumerate(zip(ends, names, strict=True)):
        begins = ends[number - 1] if number else 0
        axes.axvline(end, color="#999999", linewidth=0.7)
        axes.text((begins + end) / 2, 1.0, f"{number + 1} {name}", fontsize=8, color="#555555",
                  ha="center", va="bottom", transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_title(f"{kind}, each task over its own stage's peak", pad=18)
    axes.set(xlabel="generation", ylabel="share of the peak")
    if shown:
        axes.set_ylim(0, top_of(shown))
        axes.legend(frameon=False, loc="best", fontsize=8)


def top_of(tasks: Sequence[Mapping[str, Any]]) -> float:
    """Where the axis of shares ends: above the curves. The interval of a score near 0, over a peak
    near 0, reaches to many times the peak, and would flatten every curve."""
    shares = [p["of_peak"] for task in tasks for p in task["curve"] if p["of_peak"] is not None]
    return 1.35 * max([1.0, *shares])


def heads_of(matrix: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the scores of each row were taken after."""
    after = [(row["after_stage"], row["trained"]) for row in matrix]
    return [f"{stage} {trained}" if stage else "before" for stage, trained in after]


def _matrix(axes: Any, matrix: Sequence[Mapping[str, Any]], kind: str) -> None:
    names = list(matrix[0]["scores"])
    scores = [[row["scores"][name] for row in matrix] for name in names]
    nan = float("nan")
    values = [[cell["score"] if cell else nan for cell in row] for row in scores]
    axes.imshow(values, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for line, row in enumerate(scores):
        for column, cell in enumerate(row):
            if cell:
                low, high = cell["score_95"]
                colour = "white" if cell["score"] > 0.6 else "#222222"
                axes.text(column, line, f"{cell['score']:.2f}\n[{low:.2f}, {high:.2f}]",
                          ha="center", va="center", color=colour, fontsize=8)  # fmt: skip
    axes.set_xticks(range(len(matrix)), heads_of(matrix), fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(title=f"{kind} scores after each stage, 95 % intervals")
