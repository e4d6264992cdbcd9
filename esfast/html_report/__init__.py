"""One self-contained HTML file from run folders: what a researcher would put in a paper.

    build(runs, Path("report.html"))          # and report_figures/NAME.png beside it

    run_data.py      what run folders and forgetting.json hold
    report_data.py   runs in groups that differ in their seed alone, their curves
    seeds.py         means over the seeds of a group
    page.py style.py HTML, everything from outside escaped; the look
    drawing.py pictures.py                    figures, light and dark
    glance.py account.py training.py prompts.py prior_tasks.py sequence.py law.py change.py
    divergence.py    the sections

The file loads nothing: figures are inlined as data URIs, there is no script, and its
content-security policy forbids both. What a run does not have is left out, with a line that names
the command that adds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esfast.html_report import (
    account,
    change,
    divergence,
    glance,
    law,
    prior_tasks,
    prompts,
    training,
)
from esfast.html_report.page import Section, page
from esfast.html_report.pictures import Pictures
from esfast.html_report.report_data import ReportData
from esfast.html_report.run_data import RunData, Subject, read_runs, read_subjects
from esfast.html_report.sequence import TaskChain, sequences
from esfast.provenance import one_line
from esfast.whole_file import write_whole

__all__ = ["RunData", "Subject", "build", "read_runs", "read_subjects"]


def build(
    runs: Sequence[RunData],
    output: Path,
    made: Mapping[str, Any],
    extras: Sequence[Subject] = (),
    title: str | None = None,
    chains: Sequence[TaskChain] = (),
) -> list[Path]:
    """Writes `output` and the folder of figures beside it; returns the figures' paths.

    made: esfast.provenance.provenance() of the report itself; extras: further subjects of
    forgetting.json files, such as checkpoints; chains: sequences whose stages are among the
    runs. EsfastError where the files cannot be written.
    """
    report = ReportData(tuple(runs), tuple(extras))
    foot = one_line(dict(made))
    pictures = Pictures(foot)
    drawn = _sections(report, chains, pictures)
    sections = [section for section in drawn if section.parts or section.missing]
    text = page(title or _title(report), _subtitle(report), sections, foot)
    write_whole(output, text.encode("utf-8"))
    return pictures.write(figures_folder(output))


def figures_folder(output: Path) -> Path:
    """Where the PNGs of a report go."""
    return output.with_name(f"{output.stem}_figures")


def _sections(report: ReportData, chains: Sequence[TaskChain], pictures: Pictures) -> list[Section]:
    drift = change.drift(report, pictures)
    drift.parts += change.notes(report)
    return [
        glance.glance(report),
        account.what_was_run(report),
        training.target(report, pictures),
        prompts.prompts(report),
        prior_tasks.prior(report, pictures),
        sequences(chains, report.runs, pictures),
        law.law(report, pictures),
        drift,
        change.sparsity(report, pictures),
        divergence.kl(report, pictures),
        divergence.equal_norm(report),
        account.cost(report, pictures),
        training.answers(report),
        account.settings(report),
        account.provenance(report),
    ]


def _title(report: ReportData) -> str:
    labels = [group.label for group in report.groups]
    if len(labels) == 1:
        return f"Fine-tuning report: {labels[0]}"
    if len(labels) <= 4:
        return f"Fine-tuning report: {', '.join(labels[:-1])} and {labels[-1]}"
    return f"Fine-tuning report: {len(report.runs)} runs"


def _subtitle(report: ReportData) -> str:
    configs = [run.config for run in report.runs]
    models = dict.fromkeys(str(config.get("model", "?")) for config in configs)
    tasks = dict.fromkeys(account.task_name(run) for run in report.runs)
    first = min(str(config["made"].get("started", "?")) for config in configs)
    count = f"{len(report.runs)} runs" if len(report.runs) > 1 else "One run"
    return f"{count} of {', '.join(models)} on {', '.join(tasks)}; first begun {first}"
