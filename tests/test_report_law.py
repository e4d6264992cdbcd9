"""`esfast report` on the law of the norm: whose line is drawn, at which plateau, and when there is
no law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from report_page import Page
from report_runs import run_folder

from esfast import AnchoredDecay
from esfast.forgetting.laws import (
    l1_norm,
    l1_plateau_norm,
    l1_time_constant,
    l2_norm,
    l2_plateau_norm,
    time_constant,
)
from esfast.html_report import read_runs
from esfast.html_report.drawing import LIGHT
from esfast.html_report.law import _law, _law_lines, _rest, law
from esfast.html_report.pictures import Pictures
from esfast.html_report.report_data import ReportData
from esfast.html_report.run_data import read_run

Law = Callable[[float, float, int, int], float]


def test_every_run_has_a_line_of_its_own_law(tmp_path: Path) -> None:
    decays = (AnchoredDecay("l2", 10.0), AnchoredDecay("l2", 50.0))
    folders = [
        run_folder(tmp_path / f"es-{seed}", seed=seed, decay=decay)
        for seed, decay in enumerate(decays)
    ]
    for folder in folders:  # of one family, with other coefficients
        (folder / "config.json").write_text((folders[0] / "config.json").read_text())
    report = ReportData(tuple(read_runs([str(folder) for folder in folders])))
    (group,) = report.groups
    norms = {run.name: found for run in report.runs if (found := _law(run)) is not None}
    axes = Figure().subplots()
    _law_lines(axes, LIGHT, group, norms)
    drawn = [np.asarray(line.get_ydata()) for line in axes.lines]
    assert len(drawn) == 2 and not np.array_equal(*drawn)
    for shown, run in zip(drawn, report.runs, strict=True):
        np.testing.assert_array_equal(shown, norms[run.name])
    assert len(axes.get_legend_handles_labels()[1]) == 1


@pytest.mark.parametrize(
    ("kind", "weight", "exact", "constant", "weak"),
    [
        ("l1", 0.02, l1_norm, l1_time_constant(0.02, 8), l1_plateau_norm),
        ("l1", 1.0, l1_norm, l1_time_constant(1.0, 8), l1_plateau_norm),
        ("l2", 10.0, l2_norm, time_constant(5e-4, 10.0), l2_plateau_norm),
        ("l2", 1000.0, l2_norm, time_constant(5e-4, 1000.0), l2_plateau_norm),
    ],
)
def test_the_plateau_is_the_decays_own_at_any_strength(
    kind: str, weight: float, exact: Law, constant: float, weak: Law
) -> None:
    plateau, time = _rest(kind, 5e-4, weight, 8, 30_000)
    assert plateau == exact(5e-4, weight, 8, 30_000) and time == constant
    assert plateau is not None and plateau < weak(5e-4, weight, 8, 30_000)
    if weight >= 1000:  # half of the change is taken back every generation
        assert plateau == pytest.approx(0.577 * weak(5e-4, weight, 8, 30_000), rel=1e-3)


def test_without_decay_there_is_no_plateau() -> None:
    assert _rest(None, 5e-4, 0.0, 8, 30_000) == (None, None)


@pytest.mark.parametrize(
    ("checksum", "arguments", "elsewhere"),
    [
        (None, {}, False),
        ("0" * 16, {"arguments": {"anchor_model": "other"}}, True),
        ("0" * 16, {}, True),  # of an earlier esfast, which does not name it
        ("0" * 16, {"arguments": {"anchor_model": None}}, False),  # a wider file of the start
        ("0" * 16, {"arguments": {"anchor_model": "tiny"}}, False),
    ],
)
def test_decay_to_another_anchor_has_no_law(
    tmp_path: Path, checksum: str | None, arguments: dict[str, Any], elsewhere: bool, undrawn: None
) -> None:
    run = read_run(run_folder(tmp_path / "run", decay=AnchoredDecay("l2", 10.0)), "run")
    assert run.journal is not None
    header = run.journal.header
    anchored = replace(header, anchor_checksum=checksum or header.anchor_checksum)
    journal = replace(run.journal, header=anchored)
    run = replace(run, journal=journal, config={**run.config, **arguments})
    words = Page(law(ReportData((run,)), Pictures("")).html()).text
    assert ("the law and its plateau (decay pulls to another anchor" in words) == elsewhere
    assert ("law, own coefficients" in words) != elsewhere  # columns of dashes are left out
    assert ("plateau time constant" in words) != elsewhere
