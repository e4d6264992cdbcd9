"""The roofline (Williams, Waterman, Patterson 2009) of the noise: normals/s over normals a byte.

Slanted: the bandwidth limit. Level, one a noise: the fastest that its values were made where memory
costs next to nothing (a large population's update in the cache). A kernel cannot be above either;
how far it is below is what could be won. A panel a dtype, target and number of threads. Passes that
draw nothing (a shadow restore, the checksum) are not in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

from esfast.bench.rows import Row, bandwidths, issue_limits
from esfast.bench.show import short
from esfast.bench.workload import TORCH, UPDATE
from esfast.plots import picture

COLOURS = {"gaussian": "#27465f", "rademacher": "#3f8f5b", "hadamard": "#c4572e"}
MARKERS = {"lean": "o", "shadow": "s", "master": "^", TORCH: "X"}
GREY = "#777777"
KERNELS = ("perturb", "restore", UPDATE)  # their sum adds nothing to the picture


def draw_roofline(path: Path, rows: Sequence[Row], made: str) -> None:
    """Writes the PNG. Raises ConfigError without matplotlib."""
    panels = []
    for dtype, threads, target in _configurations(rows):
        chosen = [
            row
            for row in rows
            if (row.dtype, row.threads) == (dtype, threads) and row.target in (target, TORCH)
        ]
        title = f"{chosen[0].device}: {dtype}, {target}, {threads} thread{'s'[: threads != 1]}"
        panels.append(partial(_panel, rows=chosen, title=title))
    picture(path, panels, made)


def _configurations(rows: Sequence[Row]) -> list[tuple[str, int, str]]:
    drawn = [row for row in rows if row.target != TORCH and row.normals_per_s]
    return list(dict.fromkeys((row.dtype, row.threads, row.target) for row in drawn))


def _panel(axes: Any, rows: Sequence[Row], title: str) -> None:
    points = [row for row in rows if row.kernel in KERNELS and row.normals_per_s and row.gb_per_s]
    bandwidth = max(value * 1e9 for name, value in bandwidths(rows).items() if name != "read")
    issue = issue_limits(rows)
    intensities = [_intensity(row) for row in points]
    low, high = min(intensities) / 4, max(intensities) * 7  # room for the names of the roofs
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    _roofs(axes, bandwidth, issue, (low, high))
    for row in points:
        _point(axes, row)
    lowest = min(row.normals_per_s or 0.0 for row in points)
    axes.set_ylim(lowest / 4, 4 * max([*issue.values(), lowest]))
    _captions(axes, points)
    axes.grid(which="major", color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="normals a byte moved", ylabel="normals / s")
    _legend(axes, points)


def _intensity(row: Row) -> float:
    return (row.normals_per_s or 0.0) / (1e9 * (row.gb_per_s or 1.0))


def _roofs(axes: Any, bandwidth: float, issue: dict[str, float], ends: tuple[float, float]) -> None:
    low, high = ends
    top = max([bandwidth * low * 10, *issue.values()])
    end = min(high, top / bandwidth)
    axes.plot([low, end], [bandwidth * low, bandwidth * end], color=GREY, linewidth=1.2)
    middle = (low * min(end, 10 * low)) ** 0.5
    axes.annotate(
        f"{bandwidth / 1e9:.3g} GB/s", (middle, bandwidth * middle), xytext=(-4, 4),
        textcoords="offset points", fontsize=8, color=GREY, ha="right",
    )  # fmt: skip
    for noise, value in issue.items():
        axes.plot([value / bandwidth, high], [value, value], color=COLOURS[noise], linewidth=1.2)
        axes.annotate(
            f"{noise} {short(value)}/s", (high, value), xytext=(-4, 3),
            textcoords="offset points", fontsize=8, color=COLOURS[noise], ha="right",
        )  # fmt: skip


def _point(axes: Any, row: Row) -> None:
    peer = row.memory == TORCH
    colour = GREY if peer else COLOURS[row.noise]
    filled = colour if row.kernel != "restore" else "white"
    axes.plot(
        _intensity(row), row.normals_per_s, marker=MARKERS[row.memory], color=colour,
        markerfacecolor=filled, linestyle="none", markersize=6, markeredgewidth=1.1,
    )  # fmt: skip


def _captions(axes: Any, points: Sequence[Row]) -> None:
    """What a group of points is, below its lowest; a group is one kernel and population."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in points:
        name = "perturb" if row.kernel != UPDATE else f"update {row.population}"
        groups[name if row.memory != TORCH else f"torch: {name.split()[0]}"].append(row)
    sides = {"torch: update": "right", "torch: perturb": "left"}  # they are neighbours
    for name, rows in groups.items():
        alone = {row.noise for row in rows} == {"hadamard"}  # above: a population of 32 beside 30
        speeds = [row.normals_per_s or 0.0 for row in rows]
        middle = exp(fmean(log(_intensity(row)) for row in rows))
        axes.annotate(
            name, (middle, max(speeds) if alone else min(speeds)), xytext=(0, 6 if alone else -13),
            textcoords="offset points", ha=sides.get(name, "center"), fontsize=6.5, color=GREY,
        )  # fmt: skip


def _legend(axes: Any, points: Sequence[Row]) -> None:
    for noise in dict.fromkeys(row.noise for row in points if row.memory != TORCH):
        axes.plot([], [], color=COLOURS[noise], linewidth=5, label=noise)
    for memory in dict.fromkeys(row.memory for row in points):
        name = "torch's loops (gaussian)" if memory == TORCH else memory
        axes.plot([], [], marker=MARKERS[memory], color=GREY, linestyle="none", label=name)
    axes.plot([], [], marker="o", color=GREY, markerfacecolor="white", linestyle="none",
              label="hollow: restore")  # fmt: skip
    axes.legend(frameon=False, fontsize=7, loc="lower right")
