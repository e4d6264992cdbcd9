"""A task whose prompts begin with an instruction: the text that evolves.

The instruction stands before the problem in the first message of the user's, an empty line between:
every chat template has such a message, and so have models without one. An empty instruction leaves
a prompt as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esfast.engines.base import Message, Prompt
from esfast.errors import DataError
from esfast.tasks.base import Example, Pending, Score, Task


def instructed(prompt: Prompt, instruction: str) -> Prompt:
    """The prompt with the instruction before it. DataError for messages with none of the user's."""
    if not instruction:
        return prompt
    if isinstance(prompt, str):
        return f"{instruction}\n\n{prompt}"
    for at, turn in enumerate(prompt):
        if turn.get("role") == "user":
            said: Message = {**turn, "content": f"{instruction}\n\n{turn['content']}"}
            return [*prompt[:at], said, *prompt[at + 1 :]]
    roles = ", ".join(str(turn.get("role")) for turn in prompt)
    raise DataError(
        f"a prompt cannot take an instruction: its messages are of {roles}, and none is of the "
        "user's, before which it would stand. Give the prompts a message with the role 'user'."
    )


@dataclass(frozen=True)
class InstructedExample(Example):
    """An example whose prompt begins with an instruction; `plain` is the task's own."""

    plain: Example | None = None


class Instructed(Task):
    """`task` with `instruction` before every prompt; scores are the task's own."""

    def __init__(self, task: Task, instruction: str) -> None:
        self.task = task
        self.instruction = instruction
        self.name = task.name
        self.max_new_tokens = task.max_new_tokens
        self.failure_reward = task.failure_reward

    def train_batch(self, seed: int, generation: int, count: int) -> list[Example]:
        """As of the task, each prompt with the instruction."""
        return under(self.task.train_batch(seed, generation, count), self.instruction)

    def held_out(self, count: int) -> list[Example]:
        """As of the task, each prompt with the instruction."""
        return under(self.task.held_out(count), self.instruction)

    def score(self, example: Example, completion: str) -> Score:
        """What the task says of its own example."""
        return self.task.score(plain(example), completion)

    def safe_score(self, example: Example, completion: str) -> Score:
        """What the task says of its own example."""
        return self.task.safe_score(plain(example), completion)

    def score_all(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Score]:
        """What the task says of its own examples."""
        return self.task.score_all([plain(example) for example in examples], completions)

    def score_later(self, examples: Sequence[Example], completions: Sequence[str]) -> Pending:
        """What the task says of its own examples."""
        return self.task.score_later([plain(example) for example in examples], completions)

    def describe(self) -> dict[str, Any]:
        """Adds the instruction."""
        return {**self.task.describe(), "instruction": self.instruction}

    def close(self) -> None:
        """Closes the task."""
        self.task.close()


def plain(example: Example) -> Example:
    """The task's own example, which `under` may have put an instruction before."""
    return getattr(example, "plain", None) or example


def under(examples: Sequence[Example], instruction: str) -> list[Example]:
    """The task's own examples, each prompt with the instruction before it. Raises DataError."""
    return [
        InstructedExample(own.id, instructed(own.prompt, instruction), own.data, plain=own)
        for own in map(plain, examples)
    ]
