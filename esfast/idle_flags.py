"""Flags that were given and have nothing to act on in a run: told, since they change nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from esfast.resume import flag_of, flags_of

Acts = Callable[[argparse.Namespace], bool]


def _scores_elsewhere(args: argparse.Namespace) -> bool:
    return bool(args.reward) or (args.task or "").startswith(("custom", "reasoning_gym"))


def _has_reflection(args: argparse.Namespace) -> bool:
    return getattr(args, "reflection", None) is not None


def _has_prior_tasks(args: argparse.Namespace) -> bool:
    return args.prior_tasks is not None


PROCESSES = "scoring in processes: --reward, --task reasoning_gym:DATASET"
GOES_WITH: tuple[tuple[str, tuple[str, ...], Acts], ...] = (
    (PROCESSES, ("reward_timeout", "reward_workers", "failure_reward"), _scores_elsewhere),
    (PROCESSES, ("reward_memory",), lambda args: _scores_elsewhere(args) or _has_reflection(args)),
    (
        "--prior-tasks",
        ("prior_every", "prior_size", "prior_samples", "prior_temperature"),
        _has_prior_tasks,
    ),
    ("--reflection", ("reflection_timeout",), _has_reflection),
    (
        "the model's own reflections, without --reflection",
        ("reflection_tokens", "reflection_temperature"),
        lambda args: not _has_reflection(args),
    ),
)
"""What flags go with, and whether a run has it."""


def told_idle(
    args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None]
) -> list[str]:
    """A line for each flag that is not at its default and changes nothing in this run."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = flags_of(args, add_arguments)
    return [
        f"{flag_of(name)} {flags[name]} changes nothing here: it goes with {owner}"
        for owner, names, acts in GOES_WITH
        if not acts(args)
        for name in names
        if name in flags and flags[name] != parser.get_default(name)
    ]
