"""`esfast train --resume RUN`, and of other commands: the run's own flags, and which may change.

A flag that decides the result is refused by name; the others are recorded in the journal as a new
segment. What the data and the task say of themselves must be what it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esfast.errors import ConfigError, DataError
from esfast.launch.torchrun import under_torchrun
from esfast.run_folder import read_config

# --model, --data, --eval-data: a folder that was moved; their content is compared. --threads can
# change how an engine sums, which another machine may as well.
MAY_CHANGE = frozenset(
    (
        *("checkpoint_every", "cycles"),
        *("generations", "eval_every", "eval_size", "snapshot_every", "plots", "log_to"),
        *("threads", "reward_workers", "model", "data", "eval_data", "launcher", "engines"),
        *("prior_tasks", "prior_every", "prior_path", "anchor_model"),
        *("gpu_memory_utilization", "engine_option", "tensor_parallel_size"),
    )
)
# Only of a run that has no prior tasks yet: scores of other prompts could not be compared.
PRIOR = frozenset(("prior_size", "prior_samples", "prior_temperature"))
Adder = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True)
class PastRun:
    """A run that goes on: args, its flags with the allowed changes; recorded, its config.json;
    changes, the old and the new value of each flag that changed."""

    args: argparse.Namespace
    recorded: Mapping[str, Any]
    changes: Mapping[str, Any]

    def described(self, description: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the run: how it was made at first, and each time it went on.

        Raises ConfigError where the task is not what it was.
        """
        was, now = self.recorded.get("task"), description["task"]
        if was != now:
            raise ConfigError(
                f"the task is now {now}, and the run started with {was}: its rewards would be "
                "others. Give the data that it started with, or start a new run."
            )
        step = {"made": description["made"], "changes": dict(self.changes)}
        return {
            **description,
            "made": self.recorded.get("made", description["made"]),
            "resumed": [*self.recorded.get("resumed", []), step],
        }


def flags_of(args: argparse.Namespace, add_arguments: Adder) -> dict[str, Any]:
    """The values of the flags that `add_arguments` adds, by name."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    names = vars(parser.parse_args([]))
    return {name: getattr(args, name) for name in names if name != "resume"}


def given_flags(arguments: list[str], add_arguments: Adder) -> dict[str, Any]:
    """The flags that a command line gives, without anybody's defaults."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(arguments))


def resumed(args: argparse.Namespace, add_arguments: Adder) -> PastRun:
    """The run of --resume. Raises ConfigError, by name, for a flag that would change the result;
    DataError where the folder is no run."""
    folder = Path(args.resume)
    recorded = read_config(folder)
    flags = recorded.get("arguments")
    if not isinstance(flags, dict):
        raise DataError(f"{folder / 'config.json'} does not say with which flags the run started.")
    if recorded.get("method", "train") != args.command:
        raise ConfigError(
            f"{folder} was made by `esfast {recorded.get('method', 'train')}`, and only that can "
            "go on with it."
        )
    start = args.command_line.index(args.command) + 1
    given = given_flags(args.command_line[start:], add_arguments)
    del given["resume"]
    changed = {name: value for name, value in given.items() if value != flags.get(name)}
    _require_allowed(changed, flags)
    merged = argparse.Namespace(**{**vars(args), **flags, **changed, "output": str(folder)})
    _launch_anew(merged, given)
    changes = {name: [flags.get(name), value] for name, value in changed.items()}
    return PastRun(merged, recorded, changes)


def _launch_anew(merged: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """How many engines Ray had says nothing of a run that goes on without it."""
    if getattr(merged, "launcher", None) == "ray" and "launcher" not in given and under_torchrun():
        merged.launcher = "auto"
    if getattr(merged, "launcher", "ray") != "ray" and "engines" not in given:
        merged.engines = None


def _require_allowed(changed: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    memories = {flags.get("memory"), changed.get("memory", flags.get("memory"))}
    allowed = MAY_CHANGE if flags.get("prior_tasks") else MAY_CHANGE | PRIOR
    refused = sorted(changed.keys() - allowed)
    if "memory" in refused and "master" not in memories:
        refused.remove("memory")  # lean and shadow give the same bits
    if refused:
        shown = ", ".join(f"{flag_of(n)} {changed[n]} (it has {flags.get(n)})" for n in refused)
        may = ", ".join(flag_of(name) for name in sorted(allowed & flags.keys()))
        may += ", --memory (lean, shadow)" if flags.get("memory") in ("lean", "shadow") else ""
        raise ConfigError(
            f"the run cannot go on with {shown}: its result would be another. What may change is "
            f"{may}; for anything else start a new run."
        )


def flag_of(name: str) -> str:
    """As it is typed."""
    return "--" + name.replace("_", "-")
