"""Sections on what became of the weights, from the diagnostics of `esfast forgetting`: how much,
where, how sparsely."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from esfast.html_report.drawing import Theme, grid_of, legend_below, plain
from esfast.html_report.page import (
    DASH,
    Html,
    Section,
    number,
    paragraph,
    percent,
    table,
)
from esfast.html_report.pictures import Pictures
from esfast.html_report.report_data import ReportData, swatch
from esfast.html_report.run_data import DIAGNOSTICS, RunData, Subject

OUTSIDE = "outside layers"
PANELS = 3
SPARSE = 1e-6
HEAT = "viridis"
Cell = Mapping[str, Any]


def lacks_diagnostics(section: Section, report: ReportData, what: str) -> None:
    """Of runs that `esfast forgetting` has not measured."""
    section.lacks(what, [run for run in report.runs if run.subject is None], forgetting_command)


def forgetting_command(run: RunData, *flags: str) -> str:
    """What measures this run, and puts it where the report looks.

    The run's folder is given, by GRPO too: its config.json says which prompts are the target's.
    A folder that holds a diagnosis is refused: the new one goes beside it, and the report is told.
    """
    own = run.path / DIAGNOSTICS.parent
    beside = (own.with_name(f"{own.name}-{number}") for number in count(2))
    output = next(folder for folder in chain((own,), beside) if _is_free(folder))
    command = shlex.join(
        ["esfast", "forgetting", str(run.path), "--base", str(run.config.get("model", "MODEL")),
         "--output", str(output), *flags]
    )  # fmt: skip
    told = shlex.join(["--forgetting", str(output)])
    return command if output == own else f"{command} && esfast report ... {told}"


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


# --- where ---------------------------------------------------------------------------------------


def drift(report: ReportData, pictures: Pictures) -> Section:
    """The change at the last measured generation: in all, by module group, by layer."""
    section = Section("drift", "Where the weights moved")
    measured = [(index, subject) for index, subject in report.subjects if subject.last]
    if measured:
        section.parts.append(_whole_table(measured))
        said = "Norm of the change over the norm of the base, by module group."
        section.parts.append(_group_table(measured, "relative_norm", number, said))
        section.parts.append(
            _heat(
                report,
                pictures,
                "drift_layers",
                lambda cell: cell["relative_norm"],
                "change / base",
                "Relative norm of the change, a layer and module group; the first run of each "
                "group of seeds. One colour scale for all panels.",
            )
        )
    lacks_diagnostics(section, report, "the change by layer and module group")
    return section


def _whole_table(measured: Sequence[tuple[int, Subject]]) -> Html:
    head = ("run", "generation", "norm", "relative norm", "root mean square", "mean |change|",
            "largest", "unchanged")  # fmt: skip
    rows = []
    for index, subject in measured:
        assert subject.last is not None
        whole, generation = subject.last["whole"], subject.last["generation"]
        rows.append(
            (
                swatch(index, subject.name),
                DASH if generation is None else generation,
                number(whole["norm"], 4),
                number(whole["relative_norm"]),
                *(number(whole[name]) for name in ("rms", "mean_abs", "max_abs")),
                percent(whole["unchanged"]),
            )
        )
    return table(head, rows, "All edited weights, at the last measured generation.")


def _group_table(
    measured: Sequence[tuple[int, Subject]],
    quantity: str | Callable[[Cell], Any],
    form: Callable[[Any], str],
    caption: str,
) -> Html:
    present = [g for g in measured[0][1].file["groups"]
               if any(g in s.last["groups"] for _, s in measured if s.last)]  # fmt: skip
    value = quantity if callable(quantity) else lambda cell: cell[quantity]
    rows = []
    for index, subject in measured:
        assert subject.last is not None
        groups = subject.last["groups"]
        cells = [form(value(groups[g])) if g in groups and groups[g]["elements"] else DASH
                 for g in present]  # fmt: skip
        rows.append((swatch(index, subject.name), form(value(subject.last["whole"])), *cells))
    return table(("run", "all", *(g.replace("_", " ") for g in present)), rows, caption)


def _heat(
    report: ReportData,
    pictures: Pictures,
    name: str,
    value: Callable[[Cell], Any],
    label: str,
    caption: str,
) -> Html:
    chosen = [(text, members[0]) for _, text, members in report.subject_groups if members[0].last]
    grids = [_grid(subject, value) for _, subject in chosen]
    layers = max(len(rows) for rows, _, _ in grids)

    def draw(figure: Any, theme: Theme) -> None:
        from matplotlib.colors import LogNorm, Normalize

        found = np.concatenate([values[np.isfinite(values)] for _, _, values in grids])
        seen = found[found > 0]
        top = seen.max() if seen.size else 1.0
        wide = seen.size and top > 30 * seen.min()
        low = max(seen.min(), 1e-4 * top) if wide else 0.0
        norm = (LogNorm if wide else Normalize)(low, top)
        panels = grid_of(figure, len(chosen), PANELS, least=2)
        for axes, (title, _), (rows, columns, values) in zip(panels, chosen, grids, strict=True):
            shade = np.ma.masked_invalid(np.maximum(values, low))
            image = axes.pcolormesh(shade, cmap=HEAT, norm=norm, edgecolors=theme.page,
                                    linewidth=0.3)  # fmt: skip
            axes.grid(False)
            axes.invert_yaxis()
            axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=30, ha="right")
            shown = range(0, len(rows), max(1, len(rows) // 15))
            axes.set_yticks([row + 0.5 for row in shown], [rows[row] for row in shown])
            axes.set(title=plain(title), ylabel="layer" if axes is panels[0] else "")
        figure.colorbar(image, ax=panels, label=label, shrink=0.8, pad=0.01)

    height = (1.3 + 0.1 * layers) * -(-len(chosen) // PANELS) + 0.3
    return pictures.add(name, draw, min(max(height, 2.6), 11.0), caption)


def _grid(
    subject: Subject, value: Callable[[Cell], Any]
) -> tuple[list[str], list[str], np.ndarray]:
    """(names of rows, of columns, values [rows, columns]); NaN where there is nothing."""
    assert subject.last is not None
    cells = subject.last["cells"]
    layers = sorted({c["layer"] for c in cells if c["layer"] is not None})
    groups = [g for g in subject.file["groups"] if any(c["group"] == g for c in cells)]
    outside = [OUTSIDE] if any(c["layer"] is None for c in cells) else []
    values = np.full((len(layers) + len(outside), len(groups)), np.nan)
    for cell in cells:
        row = len(layers) if cell["layer"] is None else layers.index(cell["layer"])
        found = value(cell)
        values[row, groups.index(cell["group"])] = np.nan if found is None else found
    return [*map(str, layers), *outside], [g.replace("_", " ") for g in groups], values


# --- sparsity and energy -------------------------------------------------------------------------


def sparsity(report: ReportData, pictures: Pictures) -> Section:
    """Shares of weights that hardly moved, in absolute terms and in last places."""
    section = Section("sparsity", "Sparsity of the change")
    measured = [(index, subject) for index, subject in report.subjects if subject.last]
    if measured:
        section.parts.append(_sparsity_picture(report, pictures))
        said = f"Share of the weights with |change| < {SPARSE:g}, by module group."
        section.parts.append(_group_table(measured, _below, percent, said))
        section.parts.append(
            _heat(report, pictures, "sparsity_layers", _below, f"share below {SPARSE:g}",
                  f"Share of the weights with |change| < {SPARSE:g}, a layer and module group.")
        )  # fmt: skip
        section.parts.append(_energy_picture(report, pictures))
        section.parts.append(_energy_table(measured))
    lacks_diagnostics(section, report, "sparsity and the energy curve")
    return section


def _below(cell: Cell) -> Any:
    """The share under SPARSE; the file's thresholds are those of the schema, 1e-6 the third."""
    return cell["below"][2]


def _sparsity_picture(report: ReportData, pictures: Pictures) -> Html:
    def draw(figure: Any, theme: Theme) -> None:
        left, right = grid_of(figure, 2, 2)
        for index, label, members in report.subject_groups:
            for place, subject in enumerate(members):
                if subject.last is None:
                    continue
                whole, said = subject.last["whole"], plain(label) if place == 0 else None
                style = {"color": theme.colour(index), "marker": "o", "label": said}
                left.plot(subject.file["thresholds"], whole["below"], **style)
                right.plot(subject.file["ulps"], whole["within_ulps"], **style)
        left.set(xscale="log", xlabel="threshold", ylabel="share of the weights",
                 ylim=(-0.02, 1.02), title="|change| below a threshold")  # fmt: skip
        right.set(xscale="log", xlabel="units in the last place of the base", ylim=(-0.02, 1.02),
                  title="|change| within so many last places")  # fmt: skip
        ulps = members[0].file["ulps"]
        right.set_xticks(ulps, [f"{ulp:g}" for ulp in ulps], minor=False)
        right.minorticks_off()
        legend_below(figure)

    return pictures.add(
        "sparsity", draw, 3.3,
        "Left: share of the weights whose change is below an absolute threshold. Right: within so "
        "many units in the last place, which is what the weights' own dtype can tell apart.",
    )  # fmt: skip


def _energy_picture(report: ReportData, pictures: Pictures) -> Html:
    def draw(figure: Any, theme: Theme) -> None:
        (axes,) = grid_of(figure, 1, 1)
        for index, label, members in report.subject_groups:
            for place, subject in enumerate(members):
                held = subject.last and subject.last["energy"]["whole"]["held"]
                if held:
                    said = plain(label) if place == 0 else None
                    axes.plot(subject.file["energy_shares"], held, color=theme.colour(index),
                              label=said)  # fmt: skip
        axes.set(xscale="log", xlabel="share of the weights, largest changes first",
                 ylabel="share of Σ change²", ylim=(-0.02, 1.02))  # fmt: skip
        legend_below(figure)

    return pictures.add(
        "energy", draw, 3.2,
        "Cumulative energy: what share of the squared norm the most changed weights hold. A dense "
        "change rises late; a change of few weights early.",
    )  # fmt: skip


def _energy_table(measured: Sequence[tuple[int, Subject]]) -> Html:
    rows = []
    for index, subject in measured:
        assert subject.last is not None
        needed = subject.last["energy"]["whole"]["elements_for"]
        cells = [percent(needed.get(share)) for share in ("0.5", "0.9", "0.99")]
        rows.append((swatch(index, subject.name), *cells))
    return table(("run", "for half of the energy", "for 90 %", "for 99 %"), rows,
                 "Smallest share of the weights that holds a share of Σ change².")  # fmt: skip


def notes(report: ReportData) -> list[Html]:
    """What the diagnostics say about themselves."""
    said = dict.fromkeys(note for _, s in report.subjects for note in s.file.get("notes", []))
    return [paragraph(note, "soft") for note in said]
