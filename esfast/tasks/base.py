"""What a task is: where the prompts come from, and what a completion is worth.

Contract of a task:
- `train_batch(seed, generation, count)` and `held_out(count)` are pure functions:
  a resumed run sees the prompts that the first one saw.
- No held-out problem is ever in a training batch, whatever the seed.
- `score` never evaluates what a model wrote. It may raise or return nonsense: `safe_score` turns
  that into the task's declared failure reward, marked as failed, so that a run goes on and says how
  often it happened.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

from esfast.engines.base import Prompt
from esfast.errors import ConfigError, DataError, StateError
from esfast.tasks.draws import Draws, digest_int, held_out_keys


@dataclass(frozen=True)
class Example:
    """One prompt and what is needed to judge an answer to it.

    `id` names the problem within its task; `data` is the task's own.
    """

    id: str
    prompt: Prompt
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What one completion is worth.

    `value` is the reward, `feedback` says in words what was right or wrong, `solved` whether the
    answer is right by the strictest reading (None where a task does not say). `failed` marks a
    completion that could not be scored and got the failure reward.
    """

    value: float
    feedback: str = ""
    solved: bool | None = None
    failed: bool = False


LARGEST_REWARD = 1e30  # an update's coefficients are fp32, which ends at 3.4e38
Pending: TypeAlias = Callable[[], list[Score]]
"""Waits for scores that are on their way, and returns them."""


class Task(ABC):
    """Base of every task; see the module for the contract."""

    name: str = "task"
    max_new_tokens: int = 64
    """How long an answer may be when the user does not say."""
    failure_reward: float = 0.0
    """The reward of a completion whose scoring failed."""

    @abstractmethod
    def train_batch(self, seed: int, generation: int, count: int) -> list[Example]:
        """The `count` training prompts of a generation."""

    @abstractmethod
    def held_out(self, count: int) -> list[Example]:
        """At most `count` held-out prompts, always the same ones."""

    @abstractmethod
    def score(self, example: Example, completion: str) -> Score:
        """What `completion` is worth as an answer to `example`."""

    def safe_score(self, example: Example, completion: str) -> Score:
        """`score`, except that an exception or a reward that is no finite number is a failure."""
        try:
            score = self.score(example, completion)
        except Exception as error:
            return self.failure(f"scoring raised {type(error).__name__}: {error}")
        if not is_reward(score.value):
            return self.failure(
                f"the reward was {score.value!r}; expected a finite number, 1e30 at most"
            )
        return score

    def score_all(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Score]:
        """One score a completion, in order; never raises for what a model or a reward did."""
        pairs = zip(examples, completions, strict=True)
        return [self.safe_score(example, completion) for example, completion in pairs]

    def score_later(self, examples: Sequence[Example], completions: Sequence[str]) -> Pending:
        """As `score_all`, without the wait where scoring goes on elsewhere; may be called again
        before the first are waited for."""
        scores = self.score_all(examples, completions)
        return lambda: scores

    def failure(self, feedback: str) -> Score:
        """The score of a completion that could not be scored."""
        return Score(self.failure_reward, feedback[:500], solved=None, failed=True)

    def describe(self) -> dict[str, Any]:
        """What the run folder's config.json records of this task; plain JSON values."""
        return {"name": self.name, "max_new_tokens": self.max_new_tokens}

    def close(self) -> None:  # noqa: B027  (most tasks hold nothing)
        """Give up processes and files; twice does no harm."""


class PoolTask(Task):
    """A task over a fixed list of examples: a new permutation an epoch, no prompt left out."""

    def __init__(
        self,
        train: Sequence[Example],
        held_out: Sequence[Example],
        *,
        evaluation_only: bool = False,
    ) -> None:
        """Raises DataError where a split is empty, or a prompt or problem is in both;
        `evaluation_only` lets the training split be empty."""
        for split, examples in (("training", train), ("held-out", held_out)):
            if not examples and not (evaluation_only and split == "training"):
                raise DataError(
                    f"task {self.name!r} has no {split} prompts; give it more data "
                    f"({len(train)} training and {len(held_out)} held-out prompts are there)."
                )
        _require_apart(self.name, train, held_out)
        self._train = list(train)
        self._held_out = list(held_out)

    def train_batch(self, seed: int, generation: int, count: int) -> list[Example]:
        """Prompts `generation * count` onwards of the endless sequence of shuffled epochs.

        Raises StateError for a task that is for evaluation only.
        """
        if not self._train:
            raise StateError(f"task {self.name!r} was made for evaluation only: train on another.")
        first = generation * count
        return [self._train[self._index(seed, place)] for place in range(first, first + count)]

    def held_out(self, count: int) -> list[Example]:
        """The first `count` of the held-out examples in a fixed shuffled order."""
        order = _permutation(0, -1, len(self._held_out))
        return [self._held_out[index] for index in order[:count]]

    def describe(self) -> dict[str, Any]:
        """Adds the sizes of the two splits, and a digest of the problems in their order."""
        ids = json.dumps([[e.id for e in split] for split in (self._train, self._held_out)])
        return {
            **super().describe(),
            "train_size": len(self._train),
            "held_out_size": len(self._held_out),
            "digest": f"{digest_int(ids):016x}",
        }

    def _index(self, seed: int, place: int) -> int:
        epoch, within = divmod(place, len(self._train))
        return _permutation(seed, epoch, len(self._train))[within]


def split(
    examples: Sequence[Example], share: float, key: Callable[[Example], str] = lambda one: one.id
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: of the distinct keys `share` (0 to 1) is held out."""
    held = held_out_keys(map(key, examples), share)
    train = [example for example in examples if key(example) not in held]
    return train, [example for example in examples if key(example) in held]


def prompt_key(prompt: Prompt) -> str:
    """One text for all ways of writing a prompt: a text is one message of the user's, the order of
    a message's keys does not count, nor does white space around what it says."""
    if isinstance(prompt, str):
        return json.dumps(prompt.strip())
    messages = [
        {key: said.strip() if isinstance(said, str) else said for key, said in turn.items()}
        for turn in prompt
    ]
    if len(messages) == 1 and messages[0] == {
        "role": "user",
        "content": messages[0].get("content"),
    }:
        return json.dumps(messages[0]["content"])
    return json.dumps(messages, sort_keys=True)


def _require_apart(name: str, train: Sequence[Example], held_out: Sequence[Example]) -> None:
    """By prompts beside ids: an id may hold what a model never sees, such as a row's number."""
    prompts = {prompt_key(example.prompt) for example in train}
    shared = {key: e.prompt for e in held_out if (key := prompt_key(e.prompt)) in prompts}
    problems = {example.id for example in train} & {example.id for example in held_out}
    if not shared and not problems:
        return
    what, both = ("prompts", [*shared.values()]) if shared else ("problems", sorted(problems))
    raise DataError(
        f"task {name!r} has {len(both)} {what} both in training and held out, such as "
        f"{both[0]!r:.200}; remove them from one of the two."
    )


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    return tuple(Draws("epoch", seed, epoch).shuffled(range(size)))


def is_reward(value: object) -> bool:
    """Whether `value` is a number of a size at which sums over rewards stay finite."""
    return isinstance(value, (int, float)) and -LARGEST_REWARD <= value <= LARGEST_REWARD


def require_failure_reward(value: object) -> None:
    """Raises ConfigError for what is no reward."""
    if not is_reward(value):
        raise ConfigError(
            f"failure_reward is {value!r}; expected a finite number, {LARGEST_REWARD:g} at most in "
            "size."
        )
