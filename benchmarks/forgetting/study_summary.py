"""The study's tables in Markdown, from its rows: means over seeds with Student's 95 % intervals.

A difference between arms is paired by seed. Its p value is not given: with three seeds an interval
says as much. "Told apart" is one that leaves out 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from study_rows import TARGET, Row, columns, mean_and_interval, paired

PLAIN = "ES, N"
WIDE = 1e9


def markdown(rows: Sequence[Row], curves: Sequence[Row], controls: Sequence[Row]) -> str:
    """All tables."""
    main = [row for row in rows if row["main"]]
    tasks = [task for task in dict.fromkeys(row["task"] for row in curves) if task != TARGET]
    parts = [("Arms", _arms(main)), ("Prior tasks", _prior(main, tasks))]
    parts += [("Less plain ES, paired by seed", _differences(main, tasks))]
    parts += [("KL at the end, nats a token", _kl(main)), ("The l2 sweep", _sweep(rows, tasks))]
    if controls:
        parts.append(("Changes of one length", _controls(controls)))
    return "\n".join(f"### {title}\n\n{table}\n" for title, table in parts)


def cell(values: Sequence[float]) -> str:
    """Mean and interval of the values, or the value."""
    if not values:
        return ""
    mean, low, high = mean_and_interval(values)
    return f"{mean:.3g}" if high > WIDE else f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _of(rows: Sequence[Row], arm: str, column: str) -> list[float]:
    return [row[column] for row in rows if row["arm"] == arm and row.get(column) is not None]


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def _arms(rows: Sequence[Row]) -> str:
    wanted = {
        "target_before": "target before",
        "target_after": "target after",
        "target_after_bf16": "the same as bf16",
        "norm": "norm",
        "norm_bf16": "the same as bf16",
        "relative_norm": "relative norm",
        "below_1e-6": "share < 1e-6",
        "below_1e-6_bf16": "the same as bf16",
        "seconds": "seconds",
    }
    there = [name for name in wanted if name in columns(rows)]
    head = ["", "seeds", *(wanted[name] for name in there)]
    lines = []
    for arm in _names(rows):
        seeds = str(len(_of(rows, arm, "seed")))
        lines.append([arm, seeds, *(cell(_of(rows, arm, name)) for name in there)])
    return table(head, lines)


def _prior(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    head = ["task", "arm", "before", "worst dip", "change at the end", "recovery"]
    parts = ("before", "dip", "change", "recovery")
    lines = [
        [task, arm, *(cell(_of(rows, arm, f"{task}_{part}")) for part in parts)]
        for task in tasks
        for arm in _names(rows)
    ]
    return table(head, lines)


def _differences(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    plain = next(arm for arm in _names(rows) if arm.startswith(PLAIN))
    wanted = ["target_after", "norm", *(f"{task}_change" for task in tasks)]
    there = [name for name in wanted if name in columns(rows)]
    others = [arm for arm in _names(rows) if arm != plain]
    lines = [[arm, *(cell(paired(rows, arm, plain, name)) for name in there)] for arm in others]
    return table(["", *there], lines)


def _kl(rows: Sequence[Row]) -> str:
    diagnosed = [row for row in rows if "norm" in row]
    names = [name for name in columns(diagnosed) if name.startswith("kl_")]
    there = [name for name in names if all(name in row for row in diagnosed)]
    head = ["", *(name.removeprefix("kl_").replace("_first_", " first, ") for name in there)]
    lines = [[arm, *(cell(_of(rows, arm, name)) for name in there)] for arm in _names(rows)]
    return table(head, lines)


def _sweep(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """The first seed's, which every strength has."""
    points = [row for row in rows if row.get("alpha_lambda") is not None]
    first = min((row["seed"] for row in points), default=0)
    points = sorted((r for r in points if r["seed"] == first), key=lambda r: r["alpha_lambda"])
    wanted = ["target_after", "norm", "kl_base_first_target", "kl_base_first_writing"]
    wanted += [f"{task}_change" for task in tasks]
    there = [name for name in wanted if name in columns(points)]
    lines = [
        [f"{row['alpha_lambda']:g}", *(f"{row[n]:.3g}" if n in row else "" for n in there)]
        for row in points
    ]
    return table(["alpha lambda", *there], lines)


def _controls(rows: Sequence[Row]) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    keys = list(dict.fromkeys((row["name"], row["kind"], row["norm"]) for row in rows))
    lines = []
    for name, kind, norm in keys:
        scores = {
            row["task"]: f"{row['score']:.3g}"
            for row in rows
            if (row["name"], row["kind"], row["norm"]) == (name, kind, norm)
        }
        lines.append([name, kind, f"{norm:.3g}", *(scores.get(task, "") for task in tasks)])
    return table(["change", "", "norm", *tasks], lines)
