"""The pictures of `benchmarks/forgetting/laws.py`: what was measured as points, the laws as lines.

Holds the settings that both need: the paper's (arXiv 2605.30148) and the sizes of the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from esfast.forgetting import laws
from esfast.plots import INK, MARK, picture

ALPHA, LAMBDA, MEMBERS, GENERATIONS = 5e-4, 10.0, 30, 1000
L1_LAMBDA = 0.01
RATIOS = (0.1, 0.2, 0.4, 0.8, 1.6)  # of l1's pull to the step: lambda sqrt(N)
PART, ONE_SCALE = 262_144, 100_000  # elements of the smaller tables
OTHER = "#3f8f5f"
Row = dict[str, Any]


def of_case(rows: list[Row], title: str, column: str) -> list[float]:
    return [row[column] for row in rows if row["case"] == title]


def line(
    axes: Any, rows: list[Row], title: str, colour: str, law: bool = True, around: bool = False
) -> None:
    """Points of what was measured over a line of the law; around: circles, to see others inside."""
    generations = of_case(rows, title, "generations")
    if law:
        axes.plot(generations, of_case(rows, title, "law"), color=colour, linewidth=1)
    size, face = (8, "none") if around else (4, colour)
    axes.plot(generations, of_case(rows, title, "measured"), "o", color=colour, markersize=size,
              markerfacecolor=face, label=title)  # fmt: skip


def slope(x: list[float], y: list[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _walk_panel(axes: Any, rows: list[Row]) -> None:
    for title, colour in (("fp32, no decay", INK), ("bf16, stochastic rounding, no decay", MARK)):
        line(axes, rows, title, colour)
    free = [row for row in rows if row["case"] == "fp32, no decay"]
    fit = slope([r["generations"] for r in free], [r["measured"] for r in free])
    axes.set(xscale="log", yscale="log", xlabel="generations T", ylabel="norm of the change",
             title=f"A random walk: fitted slope {fit:+.3f} (law +1/2)")  # fmt: skip
    axes.legend(frameon=False)


def _population_panel(axes: Any, rows: list[Row]) -> None:
    sizes, seen = [r["population"] for r in rows], [r["measured"] for r in rows]
    axes.plot(sizes, [r["law"] for r in rows], color=INK, linewidth=1, label="law")
    axes.plot(sizes, seen, "o", color=INK, markersize=4, label="measured, 16 generations")
    axes.set(xscale="log", yscale="log", xlabel="population size N", ylabel="norm of the change",
             title=f"Population: fitted slope {slope(sizes, seen):+.3f} (law -1/2)")  # fmt: skip
    axes.legend(frameon=False)


def _plateau_panel(axes: Any, rows: list[Row]) -> None:
    for title, colour in (("fp32", INK), ("bf16, fp32 master", "#56a5d8"),
                          ("bf16, stochastic rounding", MARK)):  # fmt: skip
        line(axes, rows, title, colour, around=title == "fp32")
    title = "bf16, three rounded operations"
    line(axes, rows, title, OTHER, law=False)
    axes.set(xlabel="generations T", ylabel="norm of the change",
             title=f"l2 decay, lambda {LAMBDA:g}: points measured, lines the law")  # fmt: skip
    axes.legend(frameon=False)


def _left_panel(axes: Any, rows: list[Row]) -> None:
    for title, colour in (("bf16, stochastic rounding", MARK),
                          ("bf16, three rounded operations", OTHER)):  # fmt: skip
        line(axes, rows, title, colour, law=colour == MARK)
    axes.axvline(1 / (ALPHA * LAMBDA), color="#999999", linewidth=0.8, linestyle=":")
    axes.set(xlabel="generations of decay alone", ylabel="left of the change, along itself",
             ylim=(0, 1.05), title="The pull alone: line exp(-t alpha lambda)")  # fmt: skip
    axes.legend(frameon=False, loc="lower left")


def _scale_panel(axes: Any, rows: list[Row]) -> None:
    for weight, colour in ((0.0, INK), (LAMBDA, MARK)):
        chosen = [row for row in rows if row["lambda"] == weight]
        alone = [
            laws.l2_norm(ALPHA, weight, MEMBERS, ONE_SCALE, row["generations"]) for row in chosen
        ]
        x = [row["scale"] for row in chosen]
        axes.plot(x, [r["law"] / a for r, a in zip(chosen, alone, strict=True)], color=colour)
        axes.plot(x, [r["measured"] / a for r, a in zip(chosen, alone, strict=True)], "o",
                  color=colour, markersize=4,
                  label=f"l2, lambda {weight:g}, 1000 generations" if weight
                  else "no decay, 100 generations")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="spread of the weights",
             ylabel="norm / norm without rounding",
             title="What bf16's stochastic rounding adds")  # fmt: skip
    axes.legend(frameon=False)


def _alpha_panel(axes: Any, rows: list[Row]) -> None:
    for by, colour in ((0.25, INK), (1.0, MARK), (4.0, OTHER)):
        chosen = [row for row in rows if row["case"] == f"fp32, alpha x {by:g}"]
        unit = ALPHA * by * math.sqrt(PART / MEMBERS)
        axes.plot([r["generations"] for r in chosen], [r["measured"] / unit for r in chosen],
                  "o", color=colour, markersize=9 - 3 * math.log2(by + 1), label=f"alpha x {by:g}",
                  markerfacecolor="none")  # fmt: skip
    axes.plot([r["generations"] for r in chosen], [r["law"] / unit for r in chosen],
              color="#777777", linewidth=1)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="generations T",
             ylabel="norm / (alpha sqrt(d / N))",
             title="alpha * lambda held: only the unit changes")  # fmt: skip
    axes.legend(frameon=False)


def _l1_panel(axes: Any, rows: list[Row]) -> None:
    for title, colour in (("bf16, stochastic rounding, l1", MARK), ("fp32, l1", INK),
                          ("fp32, l1, five times lambda", OTHER)):  # fmt: skip
        line(axes, rows, title, colour)
    axes.set(xscale="log", yscale="log", xlabel="generations T", ylabel="norm of the change",
             title=f"l1 decay, lambda {L1_LAMBDA:g}: points measured, lines the law")  # fmt: skip
    axes.legend(frameon=False)


def _rest_panel(axes: Any, rows: list[Row]) -> None:
    step = ALPHA * math.sqrt(PART / MEMBERS)
    for what, unit, colour in (("norm", step, INK), ("unchanged", 1.0, MARK)):
        chosen = [row for row in rows if row["quantity"] == what]
        ratios = [row["lambda"] * math.sqrt(MEMBERS) for row in chosen]
        label = "norm of the change / of a step" if unit != 1.0 else "share of weights unchanged"
        axes.plot(ratios, [row["law"] / unit for row in chosen], color=colour, linewidth=1)
        axes.plot(ratios, [row["measured"] / unit for row in chosen], "o", color=colour,
                  markersize=4, label=label)  # fmt: skip
    weak = [ratio for ratio in RATIOS if ratio < 1]
    axes.plot(weak, [math.sqrt(0.5) / r for r in weak], ":", color=INK, linewidth=1)
    axes.plot(weak, [min(1.0, 2 * r * r) for r in weak], ":", color=MARK, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="pull / step = lambda sqrt(N)",
             title="l1 at rest; dotted: weak pulls, 0.71 / ratio and 2 ratio^2")  # fmt: skip
    axes.legend(frameon=False, loc="lower right")


def draw(rows: dict[str, list[Row]], path: Path, made: str) -> None:
    panels: list[Callable[[Any], None]] = [
        lambda axes: _walk_panel(axes, rows["walks"]),
        lambda axes: _population_panel(axes, rows["populations"]),
        lambda axes: _alpha_panel(axes, rows["alphas"]),
        lambda axes: _plateau_panel(axes, rows["walks"]),
        lambda axes: _left_panel(axes, rows["left"]),
        lambda axes: _scale_panel(axes, rows["scales"]),
        lambda axes: _l1_panel(axes, rows["l1"]),
        lambda axes: _rest_panel(axes, rows["l1 at rest"]),
    ]
    picture(path, panels, made)
