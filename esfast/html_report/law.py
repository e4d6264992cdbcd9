"""The section on the law that the norm of the change follows, from the journal alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esfast.errors import ConfigError
from esfast.forgetting import laws
from esfast.html_report.change import lacks_diagnostics
from esfast.html_report.drawing import Theme, grid_of, legend_below, plain, whole_generations
from esfast.html_report.page import DASH, Html, Section, number, table
from esfast.html_report.pictures import Pictures
from esfast.html_report.report_data import Group, ReportData, strategy_of, swatch
from esfast.html_report.run_data import RunData, Subject

Norms = Mapping[str, np.ndarray]
"""What a run's coefficients imply, by its name; generation 0 first."""


def law(report: ReportData, pictures: Pictures) -> Section:
    """Measured norms beside those that the journal's coefficients imply, and the closed forms."""
    section = Section("law", "How far the weights went, and the law of it")
    norms = {run.name: found for run in report.runs if (found := _law(run)) is not None}
    if norms or report.subjects:
        section.parts.append(_law_picture(report, norms, pictures))
        section.parts.append(_law_table(report, norms))
    lacks_diagnostics(section, report, "measured norms")
    bare = [run for run in report.runs if run.journal is None]
    section.lacks("the law (no journal: it is of evolution strategies)", bare)
    section.lacks(
        "the law and its plateau (decay pulls to another anchor than the weights that it started "
        "from, and the law is of noise about those)",
        filter(pulled_elsewhere, report.runs),
    )
    return section


def _elements(run: RunData) -> int:
    assert run.journal is not None
    return sum(tensor.elements for tensor in run.journal.header.tensors)


def _law(run: RunData) -> np.ndarray | None:
    """Norms by generation from the journal's coefficients; None where there is no law."""
    if run.journal is None or pulled_elsewhere(run):
        return None
    try:
        return laws.norms_of_coefficients(run.journal.generations, _elements(run))
    except ConfigError:  # l1 and l2 decay in turn
        return None


def pulled_elsewhere(run: RunData) -> bool:
    """Whether decay's anchor is not what the run started from: no law here is of that.

    Another check value alone does not say so where the run names its anchor: the file that it
    started from may be of a wider dtype than the weights.
    """
    if run.journal is None:
        return False
    header, flags = run.journal.header, run.config.get("arguments")
    if header.anchor_checksum in (None, header.base_checksum):
        return False
    return flags is None or flags.get("anchor_model") not in (None, run.config.get("model"))


def _law_picture(report: ReportData, norms: Norms, pictures: Pictures) -> Html:
    def draw(figure: Any, theme: Theme) -> None:
        (axes,) = grid_of(figure, 1, 1)
        for group in report.groups:
            _law_lines(axes, theme, group, norms)
        for index, label, members in report.subject_groups:
            _norm_points(axes, theme, index, label, members)
        axes.set(xlabel="generation", ylabel="L2 norm of the change", ylim=(0, None))
        whole_generations(axes)
        legend_below(figure)

    return pictures.add(
        "norm_law", draw, 3.6,
        "Points: norm of the change of the weights, measured. Dashed: what noise alone gives with "
        "the run's own coefficients, V ← k² (V + Σ c²), norm = √(d V), k = 1 − αλ under l2 decay, "
        "and the walk that soft thresholding pulls back under l1. "
        "Where they agree, nearly all of the distance is noise, and little of it direction. "
        "Stochastic rounding of 16-bit weights adds to the measured norm, not to the law.",
    )  # fmt: skip


def _law_lines(axes: Any, theme: Theme, group: Group, norms: Norms) -> None:
    """A line a run: the seeds' coefficients differ, and so do their lengths."""
    said: str | None = plain(f"{group.label}, law")
    for run in group.runs:
        if run.name in norms:
            axes.plot(range(len(norms[run.name])), norms[run.name], "--", linewidth=1,
                      color=theme.colour(group.number), label=said)  # fmt: skip
            said = None


def _norm_points(
    axes: Any, theme: Theme, index: int, label: str, members: Sequence[Subject]
) -> None:
    colour, named = theme.colour(index), False
    for subject in members:
        points = [(d["generation"], d["whole"]["norm"]) for d in subject.record["drift"]]
        timed = [point for point in points if point[0] is not None]
        said = None if named else plain(label)
        if timed:
            axes.plot([g for g, _ in timed], [n for _, n in timed], "o", color=colour, label=said)
        elif points:  # a checkpoint has no generation
            axes.axhline(points[-1][1], color=colour, linewidth=1, linestyle=":",
                         label=said and f"{said} (checkpoint)")  # fmt: skip
        named = named or bool(points)


def _law_table(report: ReportData, norms: Norms) -> Html:
    head = ("run", "α", "N", "λ", "T", "d", "norm measured", "law, own coefficients",
            "measured / law", "α √(T d / N)", "plateau", "time constant")  # fmt: skip
    rows = [_law_row(report, run, norms.get(run.name)) for run in report.runs]
    rows += [_extra_row(index, s) for index, s in report.subjects if s in report.extras]
    said = (
        "Norms in units of the weights; d weights, T generations. Plateau: where decay of this "
        "strength holds noise; under weak l2 √(α d / 2 λ N), under weak l1 √(d / 2) α / (λ N). "
        "Time constant, for weak decay: l2 1 / (α λ), l1 2 / (λ² N)."
    )
    return table(head, rows, said)


def _law_row(report: ReportData, run: RunData, norms: np.ndarray | None) -> Sequence[object]:
    last = run.subject.last if run.subject else None
    measured = last["whole"]["norm"] if last else None
    strategy = strategy_of(run.config)
    if run.journal is None or not strategy:
        return (report.named(run), *[DASH] * 5, number(measured), *[DASH] * 5)
    alpha, members = float(strategy["alpha"]), int(strategy["population_size"])
    decay, elements = strategy.get("decay"), _elements(run)
    done = len(run.journal.generations)
    at = done if last is None or last["generation"] is None else int(last["generation"])
    expected = None if norms is None or at >= len(norms) else float(norms[at])
    weight = float(decay["weight"]) if isinstance(decay, Mapping) else 0.0
    kind = decay["kind"] if isinstance(decay, Mapping) and weight else None
    plateau, constant = _rest(kind, alpha, weight, members, elements)
    plateau = None if pulled_elsewhere(run) else plateau
    return (
        report.named(run), number(alpha, 2), members, number(weight, 3) if decay else DASH, at,
        f"{elements:,}", number(measured, 4), number(expected, 4),
        DASH if measured is None or not expected else f"{measured / expected:.3f}",
        number(alpha * math.sqrt(at * elements / members), 4),
        number(plateau, 4), number(constant),
    )  # fmt: skip


def _rest(
    kind: str | None, alpha: float, weight: float, members: int, elements: int
) -> tuple[float, float] | tuple[None, None]:
    """What decay of any strength holds noise to, and how many generations it takes."""
    if kind is None:
        return None, None
    if kind == "l1":
        norm = laws.l1_norm(alpha, weight, members, elements)
        return norm, laws.l1_time_constant(weight, members)
    norm = laws.l2_norm(alpha, weight, members, elements)
    return norm, laws.time_constant(alpha, weight)


def _extra_row(index: int, subject: Subject) -> Sequence[object]:
    last = subject.last
    norm = number(last["whole"]["norm"], 4) if last else DASH
    return (swatch(index, subject.name), *[DASH] * 5, norm, *[DASH] * 5)
