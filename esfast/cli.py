"""The command line: `esfast train`, `forgetting`, `replay`, `apply`, `bench`, `info` and others.

What a user can mend is one paragraph on standard error and exit code 2; Ctrl-C is 130; anything
else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NoReturn

import torch

from esfast import __version__, info
from esfast.continual_command import add_continual_arguments, run_continual
from esfast.diagnosis import add_forgetting_arguments, run_forgetting
from esfast.errors import EsfastError
from esfast.grpo_command import add_grpo_arguments, run_grpo
from esfast.measure import seconds_since_import
from esfast.replay_command import (
    add_apply_arguments,
    add_export_arguments,
    add_replay_arguments,
    run_export,
    run_replay,
)
from esfast.report import INTERRUPTED
from esfast.report_command import add_report_arguments, run_report
from esfast.train_command import run_train
from esfast.train_flags import add_train_arguments

MENDABLE = 2
LESS_MEMORY = (
    "Choose a smaller model, a narrower --dtype, --memory lean, or a smaller --batch-size."
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one paragraph, without the usage of forty flags before it."""

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        self.exit(MENDABLE, f"{self.prog}: {message}. See {self.prog} --help.\n")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code (argparse's own exits raise SystemExit)."""
    args = build_parser().parse_args(argv)
    args.started_before = seconds_since_import() if argv is None else 0.0
    args.command_line = ["esfast", *(sys.argv[1:] if argv is None else argv)]
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except EsfastError as error:
        return _say(str(error), MENDABLE)
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        what = str(error).strip().splitlines()[0:1] or ["an allocation failed"]
        return _say(f"not enough memory ({what[0]}). {LESS_MEMORY}", MENDABLE)
    except KeyboardInterrupt:
        return _say("interrupted; nothing was running yet, or it has been put away.", INTERRUPTED)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = Parser(
        prog="esfast",
        description="Fine-tune language models with evolution strategies.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"esfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="fine-tune a model; alone: a small chat model and task, minutes on two cores",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_train_arguments(train)
    train.set_defaults(run=run_train)
    grpo = commands.add_parser(
        "grpo",
        help="the same by GRPO, through TRL: a baseline with the same task, prompts and account",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_grpo_arguments(grpo)
    grpo.set_defaults(run=run_grpo)
    diagnosed = commands.add_parser(
        "forgetting",
        help="what runs and checkpoints changed: weights by layer and group, KL, scores",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_forgetting_arguments(diagnosed)
    diagnosed.set_defaults(run=run_forgetting)
    continual = commands.add_parser(
        "continual",
        help="one task after another from the same weights, all of them evaluated throughout",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        conflict_handler="resolve",
        allow_abbrev=False,
    )
    add_continual_arguments(continual)
    continual.set_defaults(run=run_continual)
    _add_journal_commands(commands)
    if find_spec("esfast.bench") is not None:
        bench = import_module("esfast.bench")
        measured = commands.add_parser(
            "bench", help="measure the kernels on this machine", allow_abbrev=False
        )
        bench.add_bench_arguments(measured)
        measured.set_defaults(run=bench.run_bench)
    reported = commands.add_parser(
        "report", help="run folders as one HTML file: curves, drift, cost", allow_abbrev=False
    )
    add_report_arguments(reported)
    reported.set_defaults(run=run_report)
    shown = commands.add_parser("info", help="versions, targets, devices, build")
    shown.set_defaults(run=_run_info)
    return parser


def _add_journal_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    replayed = commands.add_parser(
        "replay", help="base model + a run's journal: the tuned model", allow_abbrev=False
    )
    add_replay_arguments(replayed)
    replayed.set_defaults(run=run_replay)
    exported = commands.add_parser(
        "export-adapter", help="a run as one small file", allow_abbrev=False
    )
    add_export_arguments(exported)
    exported.set_defaults(run=run_export)
    applied = commands.add_parser(
        "apply", help="base model + an exported run: the tuned model", allow_abbrev=False
    )
    add_apply_arguments(applied)
    applied.set_defaults(run=run_replay)


def _lacks_memory(error: Exception) -> bool:
    """torch says it on a CPU with a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error)


def _run_info(_: argparse.Namespace) -> int:
    print("\n".join(info.info_lines()))
    return 0


def _say(message: str, code: int) -> int:
    print(f"esfast: {' '.join(message.split())}", file=sys.stderr)
    return code
