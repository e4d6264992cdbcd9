"""The study's pictures, drawn from its rows alone (study_rows.py).

Lines are means over seeds with the seeds themselves thin behind them; bars are means with a dot a
seed. No interval is drawn where three seeds would make it wider than the picture: the dots are all
there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study_rows import TARGET, Row, columns

from esfast.plots import picture

COLOURS = ("#27465f", "#5b9bbf", "#c4572e", "#6b8f3d", "#8b5fa3", "#888888")
PAPER_NORMS = {"es": 119.2, "es-l1": 92.1, "es-l2": 67.7, "es-large": 58.6, "grpo": 1.32}
"""By an arm's key. arXiv 2605.30148: norm of the change, 3B model, Countdown, generation 500; N 30,
and 128 for the larger population."""
PAPER_GRPO_SPARSITY = 0.95
"""arXiv 2601.20861: share of |delta| < 1e-6 under GRPO."""
Panel = Callable[[Any], None]


class Drawing:
    """The rows of the main arms and of the sweep, and a colour an arm."""

    def __init__(self, rows: Sequence[Row], curves: Sequence[Row], made: str) -> None:
        self.main = [row for row in rows if row["main"]]
        self.sweep = sorted(
            (row for row in rows if row.get("alpha_lambda") is not None),
            key=lambda row: row["alpha_lambda"],
        )
        self.arms = list(dict.fromkeys(row["arm"] for row in self.main))
        self.curves = [row for row in curves if row["arm"] in self.arms]
        self.tasks = list(dict.fromkeys(row["task"] for row in curves))
        self.made = made

    def draw(self, folder: Path) -> list[Path]:
        """All pictures that the rows allow; returns their paths."""
        prior = [self._curve(task) for task in self.tasks if task != TARGET]
        names: list[tuple[str, list[Panel]]] = [
            ("target", [self._curve(TARGET)]),
            ("prior", prior),
            ("outcome", [self._outcome(part) for part in ("dip", "change", "recovery")]),
        ]
        if any("norm" in row for row in self.main):
            names += [
                ("change", [self._norms, self._norm_ratios, self._sparsity]),
                ("kl", self._kl_panels()),
                ("score_against_norm", [self._score_norm]),
            ]
        if len({row["alpha_lambda"] for row in self.sweep}) > 1:
            names.append(("lambda", self._sweep_panels()))
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [(folder / f"{name}.png", panels) for name, panels in names if panels]
        for path, panels in drawn:
            picture(path, panels, self.made)
        return [path for path, _ in drawn]

    def colour(self, arm: str) -> str:
        """The arm's colour in every picture."""
        return COLOURS[self.arms.index(arm) % len(COLOURS)]

    def _curve(self, task: str) -> Panel:
        def draw(axes: Any) -> None:
            for arm in self.arms:
                rows = [r for r in self.curves if r["arm"] == arm and r["task"] == task]
                _lines(axes, rows, arm, self.colour(arm))
            axes.set(title=task, xlabel="generation", ylabel="score")
            axes.legend(frameon=False, fontsize=8)

        return draw

    def _bars(self, axes: Any, column: str, arms: Sequence[str] | None = None) -> None:
        arms = list(self.arms if arms is None else arms)
        for place, arm in enumerate(arms):
            values = [row[column] for row in self.main if row["arm"] == arm and column in row]
            if values:
                axes.bar(place, np.mean(values), color=self.colour(arm), alpha=0.75, width=0.7)
                axes.plot([place] * len(values), values, "o", color="black", markersize=3)
        axes.set_xticks(range(len(arms)), arms, rotation=20, ha="right", fontsize=8)

    def _norms(self, axes: Any) -> None:
        self._bars(axes, "norm")
        axes.set(title="Norm of the change at the end", ylabel="L2 norm", yscale="log")

    def _norm_ratios(self, axes: Any) -> None:
        """Ours and the paper's, each as a share of its own ES: models and lengths differ."""
        there = [row for row in self.main if "norm" in row]
        plain = np.mean([row["norm"] for row in there if row["arm"] == self.arms[0]])
        for place, arm in enumerate(self.arms):
            values = [row["norm"] / plain for row in there if row["arm"] == arm] or [np.nan]
            axes.bar(place - 0.2, np.mean(values), width=0.38, color=self.colour(arm), alpha=0.75)
            axes.bar_label(axes.containers[-1], fmt="%.2g", fontsize=7)
        keys = {row["arm"]: row["run"].rpartition("-seed")[0] for row in self.main}
        paper = [PAPER_NORMS.get(keys[arm], np.nan) / PAPER_NORMS["es"] for arm in self.arms]
        places = np.arange(len(self.arms)) + 0.2
        bars = axes.bar(places, paper, width=0.38, color="none", edgecolor="black", hatch="///")
        axes.bar_label(bars, fmt="%.2g", fontsize=7)
        bars.set_label("arXiv 2605.30148: 3B, 500 generations")
        axes.set_xticks(range(len(self.arms)), self.arms, rotation=20, ha="right", fontsize=8)
        axes.set(title="The same, as a share of plain ES", yscale="log")
        axes.set_ylim(top=4)
        axes.legend(frameon=False, fontsize=8)

    def _sparsity(self, axes: Any) -> None:
        """As trained (ES in bf16, GRPO in fp32), and as bf16 would store it."""
        kinds = (
            ("below_1e-6", -0.2, None, "as trained"),
            ("below_1e-6_bf16", 0.2, "///", "as bf16"),
        )
        for column, shift, hatch, label in kinds:
            for place, arm in enumerate(self.arms):
                values = [row[column] for row in self.main if row["arm"] == arm and column in row]
                if values:
                    look = {"color": self.colour(arm), "alpha": 0.75, "hatch": hatch}
                    name = label if place == 0 else None
                    axes.bar(place + shift, np.mean(values), 0.38, label=name, **look)
                    axes.bar_label(axes.containers[-1], fmt="%.2g", fontsize=7)
        axes.axhline(PAPER_GRPO_SPARSITY, color="black", linestyle=":", linewidth=1)
        axes.annotate("GRPO, arXiv 2601.20861", (-0.4, PAPER_GRPO_SPARSITY + 0.01), fontsize=7)
        axes.set_xticks(range(len(self.arms)), self.arms, rotation=20, ha="right", fontsize=8)
        axes.set(title="Sparsity: share of |delta| < 1e-6", ylabel="share", ylim=(0, 1.1))
        axes.legend(frameon=False, fontsize=8, loc="center left")

    def _outcome(self, part: str) -> Panel:
        titles = {
            "dip": "Worst dip of each prior task",
            "change": "Change at the end",
            "recovery": "Recovery: end less worst",
        }

        def draw(axes: Any) -> None:
            tasks = [task for task in self.tasks if task != TARGET]
            width = 0.8 / len(self.arms)
            for number, arm in enumerate(self.arms):
                rows = [row for row in self.main if row["arm"] == arm]
                for place, task in enumerate(tasks):
                    values = [r[f"{task}_{part}"] for r in rows if f"{task}_{part}" in r]
                    if not values:
                        continue
                    x = place - 0.4 + width * (number + 0.5)
                    label = arm if place == 0 else None
                    axes.bar(x, np.mean(values), width, color=self.colour(arm), label=label)
                    axes.plot([x] * len(values), values, "o", color="black", markersize=2)
            axes.axhline(0, color="black", linewidth=0.6)
            axes.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right", fontsize=8)
            axes.set(title=titles[part], ylabel="score")
            axes.margins(y=0.3)
            axes.legend(frameon=False, fontsize=7, ncols=3)

        return draw

    def _kl_panels(self) -> list[Panel]:
        diagnosed = [row for row in self.main if "norm" in row]
        names = [name for name in columns(diagnosed) if name.startswith("kl_")]
        there = [name for name in names if all(name in row for row in diagnosed)]

        def panel(column: str) -> Panel:
            first, _, prompts = column.removeprefix("kl_").partition("_first_")
            other = "tuned" if first == "base" else "base"

            def draw(axes: Any) -> None:
                self._bars(axes, column)
                title = f"KL({first} || {other}), {prompts} prompts, {first} samples"
                axes.set(title=title, ylabel="nats a token", yscale="log")

            return draw

        return [panel(column) for column in there]

    def _score_norm(self, axes: Any) -> None:
        for arm in self.arms:
            rows = [row for row in self.main if row["arm"] == arm and "norm" in row]
            points = [row["norm"] for row in rows], [row["target_after"] for row in rows]
            axes.plot(*points, "o", color=self.colour(arm), label=arm)
        points = [row for row in self.sweep if not row["main"] and "norm" in row]
        if points:
            x, y = [row["norm"] for row in points], [row["target_after"] for row in points]
            axes.plot(x, y, "x", color="black", label="l2 sweep")
        axes.set(
            title="Target score against the norm of the change",
            xlabel="norm of the change",
            ylabel="target score at the end",
            xscale="log",
        )
        axes.legend(frameon=False, fontsize=8)

    def _sweep_panels(self) -> list[Panel]:
        kl = [
            name
            for name in columns(self.sweep)
            if name.startswith("kl_base_first_") and _strengths(self.sweep, name) > 1
        ]
        prior = [f"{task}_change" for task in self.tasks if task != TARGET]
        groups = [
            ("Target score", ["target_after"], False),
            ("Norm of the change", ["norm"], True),
            ("KL(base || tuned), base samples", kl, True),
            ("Change of the prior scores", prior, False),
        ]

        def panel(title: str, names: Sequence[str], log: bool) -> Panel:
            def draw(axes: Any) -> None:
                for name, colour in zip(names, COLOURS, strict=False):
                    label = name.removeprefix("kl_base_first_").removesuffix("_change")
                    _sweep_line(axes, self.sweep, name, colour, label)
                axes.set(title=title, xlabel="alpha lambda (0: no decay)")
                axes.set_xscale("symlog", linthresh=0.005)
                if log:
                    axes.set_yscale("log")
                if len(names) > 1:
                    axes.legend(frameon=False, fontsize=8)

            return draw

        panels = [
            panel(*group) for group in groups if any(n in columns(self.sweep) for n in group[1])
        ]
        return [*panels, self._trade_off]

    def _trade_off(self, axes: Any) -> None:
        """What decay costs and buys: the target against the prior task that lost most."""
        changes = [f"{task}_change" for task in self.tasks if task != TARGET]
        first = min(row["seed"] for row in self.sweep)
        for row in self.sweep:
            worst = min(row[name] for name in changes if name in row)
            point = (worst, row["target_after"])
            named = row["seed"] == first
            axes.plot(*point, "o", color=COLOURS[0], alpha=1.0 if named else 0.3)
            if named:
                text = f"alpha lambda {row['alpha_lambda']:g}"
                axes.annotate(text, point, (5, 4), fontsize=7, textcoords="offset points")
        axes.set(
            title="Trade-off, first seed (others pale)",
            xlabel="largest loss of a prior task",
            ylabel="target score at the end",
        )


def _strengths(rows: Sequence[Row], name: str) -> int:
    """At how many strengths of decay the rows have `name`."""
    return len({row["alpha_lambda"] for row in rows if name in row})


def _lines(axes: Any, rows: Sequence[Row], label: str, colour: str) -> None:
    by_generation: dict[int, list[float]] = {}
    for seed in dict.fromkeys(row["seed"] for row in rows):
        of_seed = sorted((r for r in rows if r["seed"] == seed), key=lambda r: r["generation"])
        x, y = [r["generation"] for r in of_seed], [r["score"] for r in of_seed]
        axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.45)
        for generation, score in zip(x, y, strict=True):
            by_generation.setdefault(generation, []).append(score)
    x = sorted(by_generation)
    means = [float(np.mean(by_generation[generation])) for generation in x]
    axes.plot(x, means, color=colour, linewidth=1.8, marker="o", markersize=3, label=label)


def _sweep_line(axes: Any, rows: Sequence[Row], name: str, colour: str, label: str) -> None:
    """A line through the seed that every strength has, a dot for each other run."""
    there = [row for row in rows if name in row]
    first = min((row["seed"] for row in there), default=0)
    line = [(row["alpha_lambda"], row[name]) for row in there if row["seed"] == first]
    dots = [(row["alpha_lambda"], row[name]) for row in there if row["seed"] != first]
    axes.plot(*zip(*line, strict=True), color=colour, marker="o", markersize=4, label=label)
    if dots:
        axes.plot(*zip(*dots, strict=True), ".", color=colour, alpha=0.5)
