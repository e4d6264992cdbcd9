"""Which prompts `esfast forgetting` asks: the held-out ones of the target task and of prior tasks.

The target is what --task, --data or --reward name, else what the first run was trained on, as its
config.json says, with answers as long as that run's (--max-new-tokens). Prior tasks are named as
`esfast train --prior-tasks` takes them; a task of lm-evaluation-harness has no prompts that a
sampled answer belongs to, and is refused.
"""

from __future__ import annotations

import argparse

from esfast.diagnosis.recorded import recorded_flags
from esfast.errors import ConfigError
from esfast.forgetting.answers import PromptSet
from esfast.prior import PriorSettings, make_own_prior_task
from esfast.tasks import TASKS
from esfast.train_flags import add_task_flags, task_of

TOKENS = "max_new_tokens"


def prompt_sets(args: argparse.Namespace, notes: list[str]) -> list[PromptSet]:
    """The target's set where there is one, then the prior ones. ConfigError, DataError.

    notes: told what had to be left out.
    """
    count = max(args.kl_count if args.kl else 0, args.score)
    sets = [*_target(args, count, notes), *_prior(args, count)]
    names = [prompts.name for prompts in sets]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"the prompts of {twice[0]} are asked for twice; leave one out.")
    if not sets:
        notes.append("KL and scores are left out: no task is known (give --task or --kl-prompts).")
    return sets


def _target(args: argparse.Namespace, count: int, notes: list[str]) -> list[PromptSet]:
    chosen = args
    if not (args.task or args.reward or args.data):
        recorded = _recorded(args, notes)
        if recorded is None:
            return []
        chosen = recorded
    task = task_of(chosen)
    tokens = args.score_tokens or getattr(chosen, TOKENS, None)
    return [PromptSet(task.name, "target", task, task.held_out(count), tokens)]


def _recorded(args: argparse.Namespace, notes: list[str]) -> argparse.Namespace | None:
    """The task flags of the first run that says them, and the length of its answers."""
    parser = argparse.ArgumentParser()
    add_task_flags(parser.add_argument_group("task"))
    defaults = {**vars(parser.parse_args([])), TOKENS: None}
    tasks = []
    for flags in map(recorded_flags, args.subjects):
        if flags is not None:
            tasks.append({**defaults, **{n: flags[n] for n in defaults if n in flags}})
    if any(task != tasks[0] for task in tasks):
        notes.append(
            "the runs were trained on different tasks, or with answers of different lengths; the "
            "target prompts and the length of a scored answer are the first run's."
        )
    return argparse.Namespace(**tasks[0]) if tasks else None


def _prior(args: argparse.Namespace, count: int) -> list[PromptSet]:
    sets = []
    settings = PriorSettings(size=max(count, 1), samples=0)
    for source in (word.strip() for word in (args.kl_prompts or "").split(",") if word.strip()):
        task = make_own_prior_task(source, settings)
        if task is None:
            raise ConfigError(
                f"--kl-prompts {source} is none of esfast's tasks ({', '.join(sorted(TASKS))}) and "
                "no JSONL file. One of lm-evaluation-harness would not do: its requests are no "
                "prompts to answer."
            )
        examples = task.task.held_out(count)
        sets.append(PromptSet(task.names[0], "prior", task.task, examples, args.score_tokens))
    return sets
