"""Sections on what the change did to the answers' distribution: KL in both directions, and changes
brought to one norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from esfast.html_report.change import forgetting_command
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
    Section,
    number,
    over,
    score,
    table,
    unscored,
)
from esfast.html_report.pictures import Pictures
from esfast.html_report.report_data import Points, ReportData, merged, swatch
from esfast.html_report.run_data import Subject

Kl = Mapping[str, Any]
Panel = tuple[str, str]  # set of prompts, direction
SMALLEST_LOG = 1e-4  # nats; a logarithmic axis is linear below
WIDE = 30  # largest over smallest from which on an axis is logarithmic


def kl(report: ReportData, pictures: Pictures) -> Section:
    """The last measured generation of every run, a panel a set of prompts and direction."""
    section = Section("kl", "KL divergence from the base, both directions")
    measured = [(n, s) for n, s in report.subjects if s.record["kl"]]
    if measured:
        panels = list(dict.fromkeys(panel for _, s in measured for panel in _last(s)))
        section.parts.append(_last_picture(report, pictures, panels))
        if any(len(_generations(s)) > 1 for _, s in measured):
            section.parts.append(_course_picture(report, pictures, panels))
        section.parts.append(_kl_table(measured))
    bare = [run for run in report.runs if run.subject is None or not run.subject.record["kl"]]
    section.lacks("KL divergence", bare, forgetting_command)
    return section


def _panel(entry: Kl) -> Panel:
    return f"{entry['prompts']} ({entry['kind']})", str(entry["direction"])


def _generations(subject: Subject) -> list[int]:
    found = {e["generation"] for e in subject.record["kl"] if e["generation"] is not None}
    return sorted(found)


def _last(subject: Subject) -> dict[Panel, Kl]:
    """The last generation's entry of each panel; a checkpoint has one alone."""
    entries = sorted(subject.record["kl"], key=lambda e: e["generation"] or 0)
    return {_panel(entry): entry for entry in entries}


def _last_picture(report: ReportData, pictures: Pictures, panels: Sequence[Panel]) -> Html:
    groups = [entry for entry in report.subject_groups if any(s.record["kl"] for s in entry[2])]

    entries = [entry for _, _, members in groups for s in members for entry in _last(s).values()]
    values = [max(e["exact"]["token_weighted"]["value"], SMALLEST_LOG) for e in entries]
    wide = max(values) > WIDE * min(values)

    def draw(figure: Any, theme: Theme) -> None:
        all_axes = grid_of(figure, len(panels), 2)
        for axes, panel in zip(all_axes, panels, strict=True):
            for row, (index, _, members) in enumerate(groups):
                _dots(axes, row, theme.colour(index), members, panel)
            axes.set_yticks(range(len(groups)), [plain(label) for _, label, _ in groups])
            axes.set(title=f"{plain(panel[1])}\n{plain(panel[0])}", ylim=(len(groups) - 0.5, -0.5))
            if wide:
                axes.set_xscale("symlog", linthresh=SMALLEST_LOG)
            axes.set_xlim(left=0)
            axes.grid(visible=False, axis="y")
        for axes in all_axes[-2:]:
            axes.set_xlabel("nats a token")

    rows = -(-len(panels) // 2)
    return pictures.add(
        "kl", draw, 0.4 + rows * (0.9 + 0.22 * len(groups)),
        "KL at the last measured generation, exact over the vocabulary at each sampled prefix, "
        "weighted by tokens; bars are 95 % intervals over the prompts. KL(base || tuned) is "
        "sampled from the base, KL(tuned || base) from the tuned model, at temperature 1.",
    )  # fmt: skip


def _dots(axes: Any, row: int, colour: str, members: Sequence[Subject], panel: Panel) -> None:
    found = [last[panel] for s in members if panel in (last := _last(s))]
    for place, entry in enumerate(found):
        estimate = entry["exact"]["token_weighted"]
        value = max(estimate["value"], 0.0)
        low, high = max(estimate["low"], 0.0), max(estimate["high"], 0.0)
        at = row + 0.5 * (place + 1) / (len(found) + 1) - 0.25
        axes.errorbar(value, at, xerr=[[max(value - low, 0)], [max(high - value, 0)]], fmt="o",
                      color=colour, capsize=2, elinewidth=1)  # fmt: skip


def _course_picture(report: ReportData, pictures: Pictures, panels: Sequence[Panel]) -> Html:
    def draw(figure: Any, theme: Theme) -> None:
        all_axes = grid_of(figure, len(panels), 2)
        for axes, panel in zip(all_axes, panels, strict=True):
            for index, label, members in report.subject_groups:
                chosen = report.averaged(index, members)
                points = [p for s in chosen if len((p := _course(s, panel)).x) > 1]
                if points:
                    curve(axes, merged(label, index, points), theme)
            axes.set(title=f"{plain(panel[1])}\n{plain(panel[0])}", xlabel="generation",
                     ylabel="nats a token", ylim=(0, None))  # fmt: skip
            whole_generations(axes)
        legend_below(figure)

    return pictures.add(
        "kl_course", draw, 0.5 + 2.4 * -(-len(panels) // 2),
        "The same over the generations: exact, weighted by tokens. "
        + report.bands("95 % intervals over the prompts"),
    )  # fmt: skip


def _course(subject: Subject, panel: Panel) -> Points:
    entries = sorted(
        (e for e in subject.record["kl"] if _panel(e) == panel and e["generation"] is not None),
        key=lambda e: e["generation"],
    )
    estimates = [e["exact"]["token_weighted"] for e in entries]
    return Points(
        [e["generation"] for e in entries],
        *([estimate[part] for estimate in estimates] for part in ("value", "low", "high")),
    )


def _kl_table(measured: Sequence[tuple[int, Subject]]) -> Html:
    head = ("run", "prompts", "direction", "generation", "prompts; tokens", "a token, exact",
            "a prompt's mean, exact", "a token, log ratio", "a whole answer, exact")  # fmt: skip
    rows = [row for index, subject in measured for row in _kl_rows(index, subject)]
    return table(head, rows, "Nats, with 95 % intervals over the prompts.")


def _kl_rows(index: int, subject: Subject) -> Iterator[Sequence[object]]:
    for (prompts, direction), entry in _last(subject).items():
        generation, exact, ratio = entry["generation"], entry["exact"], entry["log_ratio"]
        parts = (exact["token_weighted"], exact["prompt_averaged"], ratio["token_weighted"],
                 exact["sequence"])  # fmt: skip
        yield (
            swatch(index, subject.name), prompts, direction,
            DASH if generation is None else generation,
            f"{entry['count']}; {entry['tokens']:,}", *map(_nats, parts),
        )  # fmt: skip


def _nats(estimate: Mapping[str, float]) -> Html:
    low, high = number(estimate["low"]), number(estimate["high"])
    return over(number(estimate["value"]), f"[{low}, {high}]")


# --- changes of one norm -------------------------------------------------------------------------


def equal_norm(report: ReportData) -> Section:
    """The base moved by one length along different directions; one table a file that has it."""
    section = Section("equal-norm", "At equal norm: is it how far, or where to?")
    files = {id(subject.file): subject for _, subject in report.subjects}
    for subject in files.values():
        if subject.file.get("equal_norm"):
            section.parts.append(_equal_table(subject, subject.file["equal_norm"]))
    if not section.parts:
        section.lacks(
            "equal-norm controls",
            report.runs[:1],
            lambda run: forgetting_command(run, "--equal-norm", "whole"),
        )
    return section


def _equal_table(subject: Subject, found: Mapping[str, Any]) -> Html:
    controls = found["controls"]
    sets = list(dict.fromkeys(str(s["prompts"]) for c in controls for s in c["scores"]))
    panels = list(dict.fromkeys(_panel(e) for c in controls for e in c["kl"]))
    rows: list[Sequence[object]] = []
    base = {str(s["prompts"]): s for s in subject.file.get("base_scores", [])}
    if base:
        rows.append(("base", "0", *_scores(base, sets), *[DASH] * len(panels)))
    for control in controls:
        scores = {str(s["prompts"]): s for s in control["scores"]}
        entries = {_panel(e): e for e in control["kl"]}
        name = control["name"]
        if control["kind"] == "random" and control.get("seed") is not None:
            name = f"{name} (seed {control['seed']})"
        cells = [_nats(entries[p]["exact"]["token_weighted"]) if p in entries else DASH
                 for p in panels]  # fmt: skip
        rows.append((name, number(control["norm"], 4), *_scores(scores, sets), *cells))
    head = ("direction", "norm", *(f"score, {name}" for name in sets),
            *(f"{direction}, {prompts}" for prompts, direction in panels))  # fmt: skip
    one = "every tensor by itself" if found["by"] == "tensor" else "all weights together"
    return table(head, rows, f"{subject.name}: every change has the norm of {found['reference']}, "
                 f"{number(found['norm'], 4)} ({one}).")  # fmt: skip


def _scores(scores: Mapping[str, Mapping[str, Any]], sets: Sequence[str]) -> list[Html | str]:
    return [
        unscored(
            score(scores[name]["score"], scores[name]["score_95"]),
            scores[name].get("failed_rewards", 0),
        )
        if name in scores
        else DASH
        for name in sets
    ]
