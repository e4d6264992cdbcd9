"""Who writes new instructions: the model that is trained, or a function of the user's.

A reflection is text in, text out: GEPA's prompt (the instruction, a few problems with the answers
to them and the task's feedback) in, an answer that holds the new instruction out. One that raises,
hangs, or returns no text costs that proposal and is counted. The function runs in a process of its
own, as rewards do, and is the user's code: it is not sandboxed, and only it may use a network.
"""

from __future__ import annotations

from typing import Protocol

from esfast.engines.base import Completion, Engine, Sampling
from esfast.errors import ConfigError, DataError
from esfast.tasks.reward_pool import Limits, RewardFailure, RewardProcess


class ReflectionFailure(Exception):
    """One proposal came to nothing; the message says why."""


class Reflection(Protocol):
    """See the module."""

    def __call__(self, prompt: str, seed: int) -> Completion:
        """The answer to one prompt; `seed` decides what it draws. Raises ReflectionFailure."""
        ...


class OwnReflection:
    """The model that is trained answers itself, with the weights as they are."""

    def __init__(self, engine: Engine, max_new_tokens: int, temperature: float) -> None:
        self._engine = engine
        self._tokens = max_new_tokens
        self._temperature = temperature

    def __call__(self, prompt: str, seed: int) -> Completion:
        """Sampled. ReflectionFailure where the prompt does not fit the model's context."""
        sampling = Sampling(self._tokens, temperature=self._temperature, seed=seed)
        try:
            (completion,) = self._engine.generate([prompt], sampling)
        except (ConfigError, DataError):  # one reason for all, whatever their lengths
            raise ReflectionFailure(
                f"the reflection prompt and {self._tokens} tokens of an answer do not fit the "
                "model's context; write instructions with --reflection module:function instead"
            ) from None
        return completion


class FunctionReflection:
    """A function of the user's, in a process; `limits`: seconds and bytes a call."""

    def __init__(self, target: str, limits: Limits) -> None:
        """target: module:function or path/to/file.py:function. Raises ConfigError where it cannot
        be loaded."""
        self._process = RewardProcess(target, limits.timeout, limits.bytes_each())
        self._process.require_loads("reflection")

    def __call__(self, prompt: str, seed: int) -> Completion:
        """What the function returns; it is told no seed, so its repeating is its own matter."""
        try:
            reply = self._process.ask({"prompt": prompt})
        except RewardFailure as failure:
            raise ReflectionFailure(str(failure)) from None
        return Completion(str(reply["text"]), 0, True)

    def close(self) -> None:
        """Ends the process."""
        self._process.close()
