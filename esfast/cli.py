"""The command line: `esfast train`, `forgetting`, `replay`, `apply`, `bench`, `info` and others.

What a user can mend (also a file or folder that the system refuses) is one paragraph on standard
error and exit code 2; Ctrl-C and SIGTERM are 130; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from esfast import __version__, info
from esfast.bench import add_bench_arguments, run_bench
from esfast.continual_command import add_continual_arguments, run_continual
from esfast.diagnosis import add_forgetting_arguments, run_forgetting
from esfast.errors import EsfastError
from esfast.grpo_command import add_grpo_arguments, run_grpo
from esfast.interrupts import ended_as_interrupted
from esfast.lasting_output import is_worth_telling, lasting_output
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


OTHER_PLACE = "Free some space there, see to its permissions, or name another place."


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one paragraph, without the usage of forty flags before it."""

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        self.exit(MENDABLE, f"{self.prog}: {message}. See {self.prog} --help.\n")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code (argparse's own exits raise SystemExit)."""
    with lasting_output() as output:
        code = _command(argv)
        if output is not None:
            output.flush()
        lost = output.lost if output is not None else None
        if lost is None or not is_worth_telling(lost):
            return code
        told = f"standard output could not be written ({lost.strerror or lost}); else all was done."
        return _say(told, code or MENDABLE)


def _command(argv: list[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
        args.started_before = seconds_since_import() if argv is None else 0.0
        args.command_line = ["esfast", *(sys.argv[1:] if argv is None else argv)]
        run: Callable[[argparse.Namespace], int] = args.run
        with ended_as_interrupted():
            return run(args)
    except EsfastError as error:
        return _say(str(error), MENDABLE)
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        what = str(error).strip().splitlines()[0:1] or ["an allocation failed"]
        return _say(f"not enough memory ({what[0]}). {LESS_MEMORY}", MENDABLE)
    except OSError as error:
        if error.filename is None:
            raise
        told = f"cannot use {error.filename}: {error.strerror or error}. {OTHER_PLACE}"
        return _say(told, MENDABLE)
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
    for name, add_arguments, run, about in (
        ("train", add_train_arguments, run_train,
         "fine-tune a model; alone: a small chat model and task, minutes on two cores"),
        ("grpo", add_grpo_arguments, run_grpo,
         "the same by GRPO, through TRL: a baseline with the same task, prompts and account"),
        ("forgetting", add_forgetting_arguments, run_forgetting,
         "what runs and checkpoints changed: weights by layer and group, KL, scores"),
        ("continual", add_continual_arguments, run_continual,
         "one task after another from the same weights, all of them evaluated throughout"),
        ("replay", add_replay_arguments, run_replay,
         "base model + a run's journal: the tuned model"),
        ("export-adapter", add_export_arguments, run_export, "a run as one small file"),
        ("apply", add_apply_arguments, run_replay,
         "base model + an exported run: the tuned model"),
        ("bench", add_bench_arguments, run_bench, "measure the kernels on this machine"),
        ("report", add_report_arguments, run_report,
         "run folders as one HTML file: curves, drift, cost"),
        ("info", lambda _: None, _run_info, "versions, targets, devices, build"),
    ):  # fmt: skip
        command = commands.add_parser(name, help=about, allow_abbrev=False)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


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
