"""The plots of a run, from its folder alone: rewards, held-out scores, prior tasks, time spent; of
a fast-slow run the held-out scores under both instructions, and the candidates of each cycle.

Every picture says at its foot how it was made, and again in the PNG's metadata.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from esfast.errors import ConfigError
from esfast.fast_slow.cycles import HELD_OUT_PROMPT, Cycle, read_cycles
from esfast.prior.evaluation import PRIOR
from esfast.provenance import one_line
from esfast.run_folder import METRICS, PLOTS, SUMMARY, read_config, read_json, read_lines
from esfast.whole_file import whole_file

INK = "#27465f"
BAND = "#9cc0d9"
MARK = "#c4572e"
SIZE = (7.0, 4.2)
PIXELS_PER_INCH = 150
PANELS_IN_A_ROW = 3
REWARDS = {
    "train": ("± 1 sd over members", "mean of members", "best member"),
    "grpo": ("± 1 sd within a group", "mean of completions", "best of a group, mean"),
}
"""What spread, mean and best are of, by the command that made the run."""


def require_plots(wanted: bool) -> None:
    """ConfigError where plots are wanted and could not be drawn: before what they show is made."""
    if wanted and find_spec("matplotlib") is None:
        raise ConfigError(
            "plots need matplotlib, which is not installed; pip install matplotlib, or leave the "
            "plots out with --no-plots."
        )


def draw_run(folder: Path) -> list[Path]:
    """Draws what the folder's files allow; returns the pictures written.

    Raises ConfigError without matplotlib, DataError where `folder` is no run.
    """
    config = read_config(folder)
    made = one_line(config["made"])
    labels = REWARDS.get(config.get("method", "train"), REWARDS["train"])
    rows = list(read_lines(folder / METRICS)) if (folder / METRICS).exists() else []
    summary = read_json(folder / SUMMARY) if (folder / SUMMARY).exists() else {}
    held_out = [row["held_out"] for row in rows if row["held_out"]]
    if summary.get("held_out_before"):
        held_out.insert(0, summary["held_out_before"])
    cycles = read_cycles(folder)
    best = [row[HELD_OUT_PROMPT] for row in rows if row.get(HELD_OUT_PROMPT)]
    scores = partial(_both, best=best, cycles=cycles) if cycles else _held_out
    pictures: list[tuple[str, Callable[[Any], None], bool]] = [
        ("reward", lambda axes: _rewards(axes, rows, labels), bool(rows)),
        ("held_out", lambda axes: scores(axes, held_out), bool(held_out)),
        ("prompts", lambda axes: _candidates(axes, cycles), bool(cycles)),
        ("time", lambda axes: _time(axes, summary["seconds"]), bool(summary)),
    ]
    (folder / PLOTS).mkdir(exist_ok=True)
    drawn = [(folder / PLOTS / f"{name}.png", draw) for name, draw, there in pictures if there]
    for path, draw in drawn:
        picture(path, [draw], made)
    paths = [path for path, _ in drawn]
    panels = prior_panels(folder)
    if panels:
        paths.append(folder / PLOTS / "prior.png")
        picture(paths[-1], panels, made)
    return paths


def prior_panels(folder: Path) -> list[Callable[[Any], None]]:
    """A panel a prior task of the run in `folder`; none where it has none."""
    if not (folder / PRIOR).exists():
        return []
    tasks: dict[str, list[dict[str, Any]]] = {}
    for record in read_lines(folder / PRIOR):
        tasks.setdefault(record["task"], []).append(record)
    return [partial(draw_prior, records=records) for records in tasks.values()]


def draw_prior(axes: Any, records: list[dict[str, Any]]) -> None:
    """One prior task's curve of greedy and of sampled scores, with bands of 95 %, the level before
    and the worst."""
    ordered = sorted(records, key=lambda record: record["generation"])
    for kind, colour, line, wide in (("greedy", INK, "-", 2.4), ("sampled", MARK, "--", 1.2)):
        points = [(r["generation"], r[kind]) for r in ordered if r[kind]]
        if points:
            at, parts = [g for g, _ in points], [part for _, part in points]
            values = [part["score"] for part in parts]
            low, high = zip(*(part["score_95"] for part in parts), strict=True)
            count = parts[0]["samples"]
            name = kind if kind == "greedy" else f"{count} sampled a prompt"
            axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(
                at, values, line, color=colour, label=name, marker="o", linewidth=wide,
                markersize=2 + wide,
            )  # fmt: skip
            axes.axhline(values[0], color=colour, linewidth=0.7, linestyle=":")
            pick = min if ordered[0]["higher_is_better"] else max
            worst = values.index(pick(values))
            axes.plot(at[worst], values[worst], "o", color=colour, markersize=9, fillstyle="none")
    axes.set(
        title=f"{ordered[0]['task']}, {ordered[0]['prompts']} prompts; ring: the worst",
        xlabel="generation",
        ylabel=ordered[0]["metric"],
    )
    legend_below(axes)


def legend_below(axes: Any) -> None:
    """Where no curve runs, wherever it goes."""
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)


def picture(path: Path, panels: Sequence[Callable[[Any], None]], made: str) -> None:
    """A PNG at `path`, a panel a function that draws on the axes given to it, three in a row.

    made: the line at the foot and in the metadata. Raises ConfigError without matplotlib.
    """
    require_plots(True)
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ConfigError(f"matplotlib is there and cannot be loaded: {error}.") from None
    columns = min(len(panels), PANELS_IN_A_ROW)
    rows = -(-len(panels) // columns)
    size = (columns * SIZE[0], rows * SIZE[1])
    figure = Figure(figsize=size, dpi=PIXELS_PER_INCH, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, draw in zip(grid, panels, strict=False):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        draw(axes)
        if axes.get_xlabel() == "generation":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[len(panels) :]:  # not figure.axes: colour bars have some of their own
        axes.set_axis_off()
    foot = "\n".join(textwrap.wrap(made, 130 * columns))
    figure.supxlabel(foot, fontsize=5.5, color="#777777")
    _as_written(figure)
    with whole_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": "esfast", "Comment": made})


def _as_written(figure: Any) -> None:
    """No text is mathematics: file names, tasks and commands may hold two dollars, between which
    matplotlib would read it, or raise ValueError. Powers of ten at logarithmic axes stay such."""
    from matplotlib.text import Text

    axes = [axis for part in figure.axes for axis in (part.xaxis, part.yaxis)]
    powers = [axis.get_ticklabels(which="both") for axis in axes if axis.get_scale() == "log"]
    kept = {id(label) for labels in powers for label in labels}
    for text in figure.findobj(Text):
        text.set_parse_math(id(text) in kept)


def _rewards(axes: Any, rows: list[dict[str, Any]], labels: tuple[str, str, str]) -> None:
    generations = [row["generation"] for row in rows]
    mean = [row["reward_mean"] for row in rows]
    low = [row["reward_mean"] - row["reward_spread"] for row in rows]
    high = [row["reward_mean"] + row["reward_spread"] for row in rows]
    axes.fill_between(generations, low, high, color=BAND, alpha=0.6, label=labels[0])
    axes.plot(generations, mean, color=INK, label=labels[1], marker="o", markersize=3)
    best = [row["reward_best"] for row in rows]
    axes.plot(generations, best, color=MARK, linewidth=0.8, label=labels[2])
    axes.set(title="Training reward", xlabel="generation", ylabel="reward")
    legend_below(axes)


def _held_out(axes: Any, records: list[dict[str, Any]]) -> None:
    for key, colour, name, wide in (
        ("score", INK, "score", 2.4),  # where both are the same, each is seen
        ("solved", MARK, "share right", 1.0),
    ):
        if any(record[key] is None for record in records):
            continue
        _course(axes, records, key, color=colour, label=name, capsize=2 + wide, linewidth=wide,
                marker="o", markersize=3 + wide)  # fmt: skip
    count = records[0]["prompts"]
    axes.set(
        title=f"Held-out score, {count} prompts, 95 % intervals",
        xlabel="generation",
        ylabel="score",
    )
    legend_below(axes)


def _both(
    axes: Any, first: list[dict[str, Any]], best: list[dict[str, Any]], cycles: Sequence[Cycle]
) -> None:
    """Scores under the first instruction, and a line a cycle of those under its best prompt, from
    before its first generation on."""
    share = "first instruction: the weights' share"
    # Markers of two sizes: both are seen where one lies on the other.
    _course(axes, first, "score", color=INK, label=share, capsize=3, marker="o", markersize=9)
    ends = [cycle.generation for cycle in cycles[1:]] + [math.inf]
    for cycle, end in zip(cycles, ends, strict=True):
        later = [r for r in best if cycle.generation < r["generation"] <= end]
        before = [dict(cycle.held_out)] if cycle.held_out else []
        label = "the cycle's best prompt: both" if cycle is cycles[0] else None
        _course(axes, before + later, "score", color=MARK, label=label, capsize=3, marker="s",
                markersize=4)  # fmt: skip
        axes.axvline(cycle.generation, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
    axes.set(
        title=f"Held-out score, {first[0]['prompts']} prompts, 95 %; dotted: a cycle begins",
        xlabel="generation",
        ylabel="score",
    )
    legend_below(axes)


def _course(axes: Any, records: list[dict[str, Any]], key: str, **style: Any) -> None:
    """A score of every record with its interval; style: of matplotlib's errorbar."""
    at, values = [r["generation"] for r in records], [r[key] for r in records]
    below = [r[key] - r[f"{key}_95"][0] for r in records]
    above = [r[f"{key}_95"][1] - r[key] for r in records]
    axes.errorbar(at, values, yerr=(below, above), **style)


def _candidates(axes: Any, cycles: Sequence[Cycle]) -> None:
    """A column a cycle, side by side in the order of the pool."""
    kinds = {"best on no problem": "#999999", "on the Pareto front, not kept": BAND, "kept": MARK}
    for number, (name, colour) in enumerate(kinds.items()):
        points = [
            (cycle.cycle + 1 + 0.6 * (at / max(len(cycle.candidates) - 1, 1) - 0.5), c.score)
            for cycle in cycles
            for at, c in enumerate(cycle.candidates)
            if number == (c.best_on > 0) + c.kept
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=colour, label=name)
    for cycle in cycles:
        span = cycle.cycle + 0.65, cycle.cycle + 1.35
        label = "first instruction" if cycle is cycles[0] else None
        axes.hlines(cycle.candidates[0].score, *span, color=INK, linestyle=":", label=label)
    axes.set_xticks([cycle.cycle + 1 for cycle in cycles])
    axes.set(
        title=f"GEPA's candidates, mean score on {cycles[0].scored_on} problems of the cycle",
        xlabel="cycle; within it, the order in which they were found",
        ylabel="score",
    )
    axes.margins(x=0.1)
    legend_below(axes)


def _time(axes: Any, seconds: dict[str, float]) -> None:
    total = sum(seconds.values())
    parts = sorted(seconds.items(), key=lambda part: part[1])
    bars = axes.barh([name for name, _ in parts], [spent for _, spent in parts], color=INK)
    labels = [f"{spent:.1f} s, {100 * spent / total:.1f} %" for _, spent in parts]
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.margins(x=0.25)
    axes.set(title=f"Where {total:.0f} s went", xlabel="seconds")
