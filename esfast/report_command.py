"""`esfast report RUN [RUN...] -o report.html`: run folders as one HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from esfast.errors import ConfigError
from esfast.home_folders import at_home
from esfast.html_report import build, figures_folder, read_runs, read_subjects
from esfast.html_report.run_data import DIAGNOSTICS, Subject, with_subjects
from esfast.html_report.sequence import is_chain, read_chain
from esfast.provenance import provenance


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `esfast report`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of train, grpo, fast-slow or continual"
    )
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE", help="the report")
    parser.add_argument("--names", default=None, metavar="A,B", help="one a run; else the folders'")
    parser.add_argument("--title", default=None, help="of the report")
    parser.add_argument(
        "--forgetting", action="append", default=[], metavar="FILE",
        help="a forgetting.json of several (or its folder): of these runs, and others; repeatable",
    )  # fmt: skip


def run_report(args: argparse.Namespace) -> int:
    """Writes the report and its figures. Reads everything before it writes anything."""
    output = at_home(args.output)
    _require_writable(output)
    names = None if args.names is None else [name.strip() for name in args.names.split(",")]
    given = [at_home(path) for path in args.runs]
    chains = [read_chain(path) for path in given if is_chain(path)]
    stages = {chain.path: chain.stages for chain in chains}
    folders = [folder for path in given for folder in stages.get(path, (path,))]
    runs = read_runs([str(folder) for folder in folders], names)
    diagnosed = [(Path(path), found) for path in args.forgetting for found in read_subjects(path)]
    known = [(run.path / DIAGNOSTICS, run.subject) for run in runs if run.subject] + diagnosed
    runs, extras = with_subjects(runs, [subject for _, subject in diagnosed])
    console = Console()
    for line in _not_shown(known, [*extras, *(run.subject for run in runs if run.subject)]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    with console.status("drawing the report"):
        figures = build(runs, output, provenance(args.command_line), extras, args.title, chains)
    count = f"{len(runs)} runs" if len(runs) > 1 else "one run"
    console.print(
        f"{output}: {count}, {output.stat().st_size / 1e6:.1f} MB; {len(figures)} figures in "
        f"{figures_folder(output)}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def _not_shown(known: Sequence[tuple[Path, Subject]], shown: Sequence[Subject]) -> list[str]:
    """Diagnoses that others of the same run took the place of, each with its file."""
    records = [subject.record for subject in shown]
    return [
        f"{path}: its diagnosis of {subject.name} is not in the report, which has another of that "
        "run; a report takes one a run"
        for path, subject in known
        if subject.record not in records
    ]


def _require_writable(output: Path) -> None:
    """ConfigError where the report could not be put there, before runs are read."""
    if output.is_dir():
        raise ConfigError(
            f"--output is the folder {output}; give a file, such as {output / 'report.html'}."
        )
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output} is in a folder that is not there; make it first.")
    if output.is_file() and not _is_page(output):
        raise ConfigError(
            f"--output {output} is there already and no report; give another name, or remove it."
        )


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(14).lower() in (b"<!doctype html", b"")  # or empty, as mktemp makes it
