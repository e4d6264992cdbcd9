"""`esfast report` on the law of the norm: whose line is drawn, at which plateau, and when there is
no law."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from report_runs import run_folder

from esfast import AnchoredDecay
from esfast.html_report import read_runs
from esfast.html_report.drawing import LIGHT
from esfast.html_report.law import _law, _law_lines
from esfast.html_report.report_data import ReportData


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
