"""Sections on how it was done: what was run, what it cost, with which settings, from what."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from esfast.cost import Tokens
from esfast.html_report.drawing import Theme, curve, grid_of, legend_below, plain
from esfast.html_report.page import (
    DASH,
    Html,
    Section,
    code,
    flat,
    joined,
    large,
    over,
    percent,
    seconds,
    table,
    text,
)
from esfast.html_report.pictures import Pictures
from esfast.html_report.report_data import Points, ReportData, strategy_of, swatch
from esfast.html_report.run_data import RunData
from esfast.html_report.sequence import is_chain
from esfast.journal_format import MarkRecord
from esfast.measure import LOOP, PROMPT_SEARCH
from esfast.resources import readable

APART = ("evaluation", "prior tasks")
"""Parts of the clock that measure rather than train."""


def what_was_run(report: ReportData) -> Section:
    """A row a group: method, model, task, and the settings that a reader looks for first."""
    section = Section("run", "What was run")
    head = ("runs", "method", "model", "task", "settings", "seeds", "state")
    rows = [
        (
            swatch(group.number, group.label),
            group.runs[0].method,
            joined([str(group.runs[0].config.get("model", DASH)), ", ",
                    str(group.runs[0].config.get("dtype", DASH))]),
            task_name(group.runs[0]),
            _main_settings(group.runs[0]),
            ", ".join(str(DASH if run.seed is None else run.seed) for run in group.runs),
            ", ".join(dict.fromkeys(_state(run) for run in group.runs)),
        )
        for group in report.groups
    ]  # fmt: skip
    section.parts.append(table(head, rows, kind="words"))
    return section


def _state(run: RunData) -> str:
    return str(run.summary["status"]) if run.summary else "not finished"


def task_name(run: RunData) -> str:
    """The task that was trained on."""
    task = run.config.get("task")
    return str(task.get("name", DASH)) if isinstance(task, Mapping) else str(task or DASH)


def _main_settings(run: RunData) -> str:
    settings, strategy = run.config["settings"], strategy_of(run.config)
    parts = [f"{settings.get('generations', DASH)} generations",
             f"{settings.get('prompts', DASH)} prompts"]  # fmt: skip
    if strategy:
        parts += [
            f"N {strategy['population_size']}",
            f"σ {strategy['sigma']:g}",
            f"α {strategy['alpha']:g}",
        ]
        decay = strategy.get("decay")
        parts.append(f"{decay['kind']} λ {decay['weight']:g}" if decay else "no decay")
    else:
        parts += [
            f"{label} {settings[name]:g}"
            for name, label in (("group_size", "group size"), ("learning_rate", "learning rate"),
                                ("iterations", "iterations"), ("beta", "β"))
            if isinstance(settings.get(name), (int, float))
        ]  # fmt: skip
    return ", ".join(parts)


# --- cost ----------------------------------------------------------------------------------------


def cost(report: ReportData, pictures: Pictures) -> Section:
    """Tokens, FLOPs, seconds and memory; and the score by what it had cost so far."""
    section = Section("cost", "What it cost")
    rows = [_cost_row(report, run) for run in report.runs if run.summary]
    if rows:
        head = ("run", "prompt tokens", "generated tokens", "read again", "backward tokens",
                "FLOPs", "FLOPs of the prompt search", "FLOPs of measuring",
                "training time", "measuring time",
                "not generating or scoring", "peak memory")  # fmt: skip
        formulas = dict.fromkeys(
            run.summary["cost"]["formula"] for run in report.runs
            if run.summary and run.summary.get("cost")
        )  # fmt: skip
        said = (
            "Of training; below FLOPs forward + backward, below memory the peak over that of "
            "generating alone. Measuring is held-out prompts + prior tasks, and not training. "
        )
        section.parts.append(table(head, rows, said + "; ".join(formulas)))
    section.parts += _by_cost(report, pictures)
    section.parts += _times(report, pictures)
    untold = "(of an earlier esfast, or not told)"
    ended = [(run, run.summary) for run in report.runs if run.summary]
    bare = [run for run, summary in ended if not summary.get("cost")]
    section.lacks(f"the account of tokens and FLOPs {untold}", bare)
    bare = [run for run, summary in ended if summary.get("prior") and _prior_unknown(summary)]
    section.lacks(f"the tokens of prior tasks {untold}", bare)
    unfinished = [run for run in report.runs if not run.summary]
    section.lacks("the summary: the run is not finished", unfinished, resume_command)
    return section


def resume_command(run: RunData) -> str:
    """What goes on with a run that is not finished."""
    if is_chain(run.path.parent):
        return f"esfast continual --resume {shlex.quote(str(run.path.parent))}"
    return f"esfast {run.command} --resume {shlex.quote(str(run.path))}"


def _cost_row(report: ReportData, run: RunData) -> Sequence[object]:
    assert run.summary is not None
    summary, account = run.summary, run.summary.get("cost") or {}
    training = account.get("training", {})
    spent = summary.get("seconds", {})
    apart = [spent[part] for part in APART if part in spent]
    return (
        report.named(run),
        *(large(training.get(name)) for name in ("prompt", "generated", "reread", "backward")),
        _flops(training),
        large((account.get("search") or {}).get("flops")),
        _measuring_flops(account),
        seconds(_training_seconds(spent)),
        seconds(sum(apart) if apart else None),
        percent(summary.get("outside_share_of_loop")),
        _peak(summary.get("peak_bytes"), summary.get("peak_over_inference")),
    )


def _flops(training: Mapping[str, float]) -> Html:
    if "flops" not in training:
        return Html(DASH)
    parts = (training["forward_flops"], training["backward_flops"])
    return over(large(training["flops"]), joined(map(large, parts), " + "))


def _prior_unknown(summary: Mapping[str, Any]) -> bool:
    account = summary.get("cost") or {}
    return bool(account) and account.get("prior") is None


def _measuring_flops(account: Mapping[str, Any]) -> Html | str:
    """Held-out prompts + prior tasks; a dash for what an earlier esfast did not count."""
    parts = [(account.get(part) or {}).get("flops") for part in ("evaluation", "prior")]
    known = [part for part in parts if part is not None]
    if not known:
        return DASH
    return over(large(sum(known)), joined(map(large, parts), " + "))


def _peak(peak: int | None, ratio: float | None) -> Html | str:
    if peak is None or ratio is None:
        return DASH if peak is None else readable(peak)
    return over(readable(peak), f"{ratio:.2f} × generating")


def _training_seconds(spent: Mapping[str, float]) -> float:
    """All but evaluation, loading and saving; a fast-slow run's search for prompts too."""
    return sum(spent.get(part, 0.0) for part in (*LOOP, PROMPT_SEARCH) if part not in APART)


def _by_cost(report: ReportData, pictures: Pictures) -> list[Html]:
    timed = report.series(lambda run: _score_by(run, _seconds_at(run)))
    counted = report.series(lambda run: _score_by(run, _flops_at(run)))
    if report.seeds or not timed:  # seeds take different times: there is no common axis
        return []

    def draw(figure: Any, theme: Theme) -> None:
        panels = grid_of(figure, 2 if counted else 1, 2)
        for series in timed:
            curve(panels[0], series, theme)
        panels[0].set(xlabel="seconds of training", ylabel="held-out score")
        for series in counted:
            curve(panels[-1], series, theme)
        if counted:
            panels[-1].set(xlabel="FLOPs of training", ylabel="held-out score")
        legend_below(figure)

    return [
        pictures.add(
            "score_by_cost", draw, 3.2, "Held-out score by what training had cost until then."
        )
    ]


def _score_by(run: RunData, axis: Mapping[int, float]) -> Points:
    records = [r for r in run.held_out if r["generation"] in axis]
    return Points(
        [axis[r["generation"]] for r in records],
        [r["score"] for r in records],
        [r["score_95"][0] for r in records],
        [r["score_95"][1] for r in records],
    )


def _seconds_at(run: RunData) -> dict[int, float]:
    """Training seconds so far, by generation. A row's clock stops before its own evaluation."""
    timed = {row["generation"]: _training_seconds(row["total_seconds"]) for row in run.rows}
    return {0: 0.0, **timed} if timed else {}


def _flops_at(run: RunData) -> dict[int, float]:
    """Training FLOPs so far, by generation; the formula of esfast.cost."""
    parameters = ((run.summary or {}).get("cost") or {}).get("parameters")
    rows = [row for row in run.rows if row.get("cost")]
    if parameters is None or not rows:
        return {}
    counted = {
        row["generation"]: float(
            sum(
                sum(Tokens(**row["cost"][part]).flops(parameters))
                for part in ("training", "search")
                if part in row["cost"]
            )
        )
        for row in rows
    }
    return {0: 0.0, **counted}


def _times(report: ReportData, pictures: Pictures) -> list[Html]:
    runs = [run for run in report.runs if run.summary and run.summary.get("seconds")]
    if not runs:
        return []
    parts = list(dict.fromkeys(part for run in runs for part in _spent(run)))

    def draw(figure: Any, theme: Theme) -> None:
        (axes,) = grid_of(figure, 1, 1)
        left = [0.0] * len(runs)
        for index, part in enumerate(parts):
            widths = [_spent(run).get(part, 0.0) for run in runs]
            again = index // len(theme.groups)  # a second turn of the colours is paler
            axes.barh(range(len(runs)), widths, left=left, color=theme.colour(index),
                      alpha=0.45 if again else 1.0, label=plain(part), height=0.6)  # fmt: skip
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(runs)), [plain(run.name) for run in runs])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(xlabel="seconds")
        legend_below(figure, columns=7)

    return [pictures.add("time", draw, 1.1 + 0.24 * len(runs), "Where the wall time went.")]


def _spent(run: RunData) -> Mapping[str, float]:
    assert run.summary is not None
    return run.summary["seconds"]


# --- settings and provenance ---------------------------------------------------------------------


def settings(report: ReportData) -> Section:
    """Every setting, a column a group; those that differ are marked."""
    section = Section("settings", "Configuration")
    columns = [_configuration(group.runs[0]) for group in report.groups]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = []
    for name in names:
        values = [column.get(name, DASH) for column in columns]
        differ = len(set(values)) > 1
        rows.append((name, *(_marked(value) if differ else value for value in values)))
    head = ("setting", *(swatch(group.number, group.label) for group in report.groups))
    section.parts.append(table(head, rows, "Marked: what differs between the runs.", kind="words"))
    return section


def _configuration(run: RunData) -> dict[str, str]:
    """What tells families of runs apart; of prior tasks their names."""
    conditions = dict(run.conditions)
    if conditions["engine"] is None:  # GRPO has its own
        del conditions["engine"]
    if conditions["prior"]:
        names = [task.get("source") for task in conditions["prior"]["tasks"]]
        conditions["prior"] = {**conditions["prior"], "tasks": names}
    return flat({**conditions, **run.config["settings"]})


def _marked(value: str) -> Html:
    return Html(f'<span class="changed">{text(value)}</span>')


def provenance(report: ReportData) -> Section:
    """How each run was made, so that it can be made again, and what proves that it was this one."""
    section = Section("provenance", "Versions, commands, checksums")
    for run in report.runs:
        rows = [(name, value) for name, value in _made(run) if value not in (None, "")]
        section.parts.append(table((report.named(run), ""), rows, kind="words"))
    return section


def _made(run: RunData) -> list[tuple[str, object]]:
    made = run.config["made"]
    packages = {"Python": made.get("python"), **made.get("packages", {})}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    commit = f", commit {made['commit']}" if made.get("commit") else ""
    return [
        ("command", code(made.get("command", DASH))),
        ("folder", code(run.path)),
        ("started", made.get("started")),
        ("esfast", f"{made.get('esfast')}{commit}, noise version {made.get('noise_version')}, "
                   f"{made.get('target')}"),
        ("versions", versions),
        ("machine", f"{made.get('platform', DASH)}; device {run.config.get('device', DASH)}"),
        ("task", _digest(run)),
        ("tuned", _tuned(run)),
        *_journal(run),
    ]  # fmt: skip


def _digest(run: RunData) -> str | None:
    task = run.config.get("task")
    return (
        ", ".join(f"{k} {v}" for k, v in flat(task).items()) if isinstance(task, Mapping) else None
    )


def _tuned(run: RunData) -> str | None:
    """What was tuned and what not, where the run says so (GRPO)."""
    tuning = run.config.get("tuning")
    if not tuning:
        return None
    return f"{tuning['tuned']}. Not tuned: {tuning['not_tuned']}"


def _journal(run: RunData) -> list[tuple[str, object]]:
    if run.journal is None:
        return [("journal", "none")]
    journal = run.journal
    marks = [record for record in journal.records if isinstance(record, MarkRecord)]
    at_end = f"; weights {marks[-1].checksum} after {marks[-1].generation}" if marks else ""
    return [
        (
            "journal",
            joined([f"{len(journal.generations)} generations, check value ",
                    code(journal.chains[-1].hex()), f"; base {journal.header.base_checksum}",
                    at_end, f"; {journal.torn}" if journal.torn else ""]),
        )
    ]  # fmt: skip
