"""The command line: `esfast train`, `forgetting`, `replay`, `apply`, `bench`, `info` and others.

What a user can mend (also a file or folder that the system refuses) is one paragraph on standard
error and exit code 2; Ctrl-C and SIGTERM are 130; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn

import esfast
from esfast.errors import MENDABLE, EsfastError
from esfast.failures import visible
from esfast.interrupts import INTERRUPTED, ended_as_interrupted
from esfast.lasting_output import is_worth_telling, lasting_output

LESS_MEMORY = {
    "dtype": "a narrower --dtype",
    "memory": "--memory lean",
    "kl_dtype": "--kl-dtype bfloat16",
    "batch_size": "a smaller --batch-size",
    "micro_batch": "a smaller --micro-batch",
}
"""What takes less of it, by the flag that a command may have."""
OTHER_PLACE = "Free some space there, see to its permissions, or name another place."

COMMANDS = (
    ("train", "esfast.train_flags:add_train_arguments", "esfast.train_command:run_train",
     "fine-tune a model; alone: a small chat model and task, minutes on two cores"),
    ("grpo", "esfast.grpo_command:add_grpo_arguments", "esfast.grpo_command:run_grpo",
     "the same by GRPO, through TRL: a baseline with the same task, prompts and account"),
    ("fast-slow", "esfast.fast_slow_command:add_fast_slow_arguments",
     "esfast.fast_slow_command:run_fast_slow",
     "cycles: prompts evolve by GEPA, then weights by evolution strategies under them"),
    ("forgetting", "esfast.diagnosis:add_forgetting_arguments", "esfast.diagnosis:run_forgetting",
     "what runs and checkpoints changed: weights by layer and group, KL, scores"),
    ("continual", "esfast.continual_command:add_continual_arguments",
     "esfast.continual_command:run_continual",
     "one task after another from the same weights, all of them evaluated throughout"),
    ("replay", "esfast.replay_command:add_replay_arguments", "esfast.replay_command:run_replay",
     "base model + a run's journal: the tuned model"),
    ("export-adapter", "esfast.replay_command:add_export_arguments",
     "esfast.replay_command:run_export", "a run as one small file"),
    ("apply", "esfast.replay_command:add_apply_arguments", "esfast.replay_command:run_replay",
     "base model + an exported run: the tuned model"),
    ("bench", "esfast.bench:add_bench_arguments", "esfast.bench:run_bench",
     "measure the kernels on this machine"),
    ("report", "esfast.report_command:add_report_arguments", "esfast.report_command:run_report",
     "run folders as one HTML file: curves, drift, cost"),
    ("info", None, "esfast.info:run_info", "versions, targets, devices, build"),
)  # fmt: skip
"""Name, what adds its flags if it has any, what runs it, and what it does."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one paragraph, without the usage of forty flags before it."""

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        self.exit(MENDABLE, f"{self.prog}: {message}. See {self.prog} --help.\n")


class Help(argparse.HelpFormatter):
    """Ends the line of a flag by its default, where it has one; SIZE stands for EVAL_SIZE."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.rpartition("_")[2].upper()

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        unsaid = default is None or default is False or default in ("", [], argparse.SUPPRESS)
        if not action.option_strings or unsaid or "%(default)" in text:
            return text  # argparse writes it for --flag, --no-flag until Python 3.13
        shown = " ".join(map(str, default)) if isinstance(default, list) else "%(default)s"
        return f"{text} (default: {shown})"


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
    args = argparse.Namespace()
    try:
        words = sys.argv[1:] if argv is None else argv
        args = build_parser(next(iter(words), "")).parse_args(words)
        # Not the process's age: a shell that ends with `esfast train` hands its process over.
        args.started_before = time.perf_counter() - esfast.BEGAN if argv is None else 0.0
        args.command_line = ["esfast", *words]
        run: Callable[[argparse.Namespace], int] = args.run
        with ended_as_interrupted():
            return run(args)
    except EsfastError as error:
        return _say(str(error), MENDABLE)
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        what = str(error).strip().splitlines()[0:1] or ["an allocation failed"]
        mends = [said for name, said in LESS_MEMORY.items() if hasattr(args, name)]
        mend = ", or ".join(["a smaller model", *mends])
        return _say(f"not enough memory ({what[0]}). Choose {mend}.", MENDABLE)
    except OSError as error:
        place = error.filename or _unnamed_folder(error)
        if place is None:
            raise
        told = f"cannot use {place}: {error.strerror or error}. {OTHER_PLACE}"
        return _say(told, MENDABLE)
    except KeyboardInterrupt:
        return _say("interrupted; nothing is left half-done.", INTERRUPTED)


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of every command; with `only`, the flags of that one alone."""
    parser = Parser(
        prog="esfast",
        description="Fine-tune language models with evolution strategies.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"esfast {esfast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, flags, run, about in COMMANDS:
        command = commands.add_parser(
            name, help=about, allow_abbrev=False, formatter_class=Help, description=about
        )
        if only in (None, name):
            command.set_defaults(run=_named(run))
            if flags is not None:
                _named(flags)(command)
    return parser


def _named(place: str) -> Callable[..., int]:
    """The function at module:name, of which the modules of one command are loaded alone: torch
    takes a second."""
    module, _, name = place.partition(":")
    function: Callable[..., int] = getattr(import_module(module), name)
    return function


def _lacks_memory(error: Exception) -> bool:
    """torch says it on a GPU with an exception of its own, on a CPU with a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "can't allocate memory" in str(error)


def _unnamed_folder(error: OSError) -> str | None:
    """The one that Python misses without a name: torch may want a temporary folder as it is loaded,
    and a container that may write nowhere has none."""
    missing = isinstance(error, FileNotFoundError) and "temporary" in str(error.strerror)
    return "a temporary folder (TMPDIR names one)" if missing else None


def _say(message: str, code: int) -> int:
    print(f"esfast: {visible(' '.join(message.split()))}", file=sys.stderr)
    return code
