"""A user's own task: prompts from a JSONL file, a reward function from a Python module.

    esfast train --reward my_rewards:score --data prompts.jsonl

Each row has a "prompt" (a string, or chat messages) and whatever else the function wants:

    def score(example: dict, completion: str) -> float | tuple[float, str]

`example` is the row; the optional string is feedback in words. The function runs in processes of
its own (see `reward_pool`): when it raises, crashes, returns no finite number, takes longer than
the time limit or more memory than it may, that completion gets the failure reward and is counted,
and the run goes on. It is the user's code and is not sandboxed; what the model wrote is only ever
handed to it as text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esfast.errors import ConfigError, DataError
from esfast.tasks.base import Example, Score, prompt_key, require_failure_reward, split
from esfast.tasks.draws import digest_int
from esfast.tasks.json_lines import prompt_of, read_rows
from esfast.tasks.reward_pool import Limits, PooledTask, RewardPool

HELD_OUT_SHARE = 0.2


class Custom(PooledTask):
    """Prompts of the user's, scored by a function of the user's."""

    name = "custom"

    def __init__(
        self,
        reward: str | None = None,
        data: str | Path | None = None,
        eval_data: str | Path | None = None,
        timeout: float = 10.0,
        workers: int = 1,
        failure_reward: float = 0.0,
        memory: float | None = None,
        evaluation_only: bool = False,
    ) -> None:
        """Without `eval_data`, a fifth of the prompts is held out (at least one), and all of them
        where the task is for `evaluation_only`.

        `timeout`: seconds a completion; `workers`: processes that score side by side;
        `memory`: GiB of each, 0 for no limit; `reward_pool.Limits` says what it is when not given.
        Raises ConfigError for a function that cannot be loaded, DataError for bad rows.
        """
        if not reward or data is None:
            raise ConfigError("a task of your own needs both --reward module:function and --data.")
        require_failure_reward(failure_reward)
        limits = Limits(timeout, workers, Limits.bytes_of(memory))
        train = _examples(Path(data))
        if evaluation_only:
            train, held_out = [], train
        elif eval_data is None:
            train, held_out = _split(Path(data), train)
        else:
            held_out = _examples(Path(eval_data))
        super().__init__(train, held_out, evaluation_only=evaluation_only)
        self.failure_reward = failure_reward
        self._reward = reward
        self.pool = RewardPool(reward, limits)
        self.pool.require_loads()

    def score(self, example: Example, completion: str) -> Score:
        """What the user's function says. Raises RewardFailure."""
        return self.pool.call(example.data["row"], completion)

    def describe(self) -> dict[str, Any]:
        """Adds the function's name."""
        return {**super().describe(), "reward": self._reward}


def _examples(path: Path) -> list[Example]:
    examples = {}
    for line, row in read_rows(path, required=("prompt",)):
        prompt = prompt_of(path, line, row)
        key = f"{digest_int(json.dumps(row, sort_keys=True)):016x}"
        examples[key] = Example(key, prompt, {"row": row})
    return list(examples.values())


def _split(path: Path, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Splits by prompt, so that two rows with one prompt stay together."""
    train, held_out = split(examples, HELD_OUT_SHARE, lambda one: prompt_key(one.prompt))
    if not held_out:
        raise DataError(
            f"{path} has one prompt; at least two are needed, one to train on and one to hold out. "
            "Add prompts, or give held-out ones with --eval-data."
        )
    return train, held_out
