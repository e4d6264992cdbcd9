"""Several engines that evaluate a generation between them, as a run sees them.

To the loop a fleet is an engine like any other: it generates under the run's weights, and offers
them to edit. Beside that it takes the members of a generation all at once. Every engine of it holds
the model; scalars, prompts and texts are all that goes to and fro.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from esfast.engines.base import Completion, Engine, Measured, Prompt, Sampling


@dataclass(frozen=True)
class MemberAnswers:
    """What one member of a generation answered, a completion a prompt; and the seconds that its
    engine took to apply the member and to generate."""

    number: int
    completions: tuple[Completion, ...]
    perturb_seconds: float
    generate_seconds: float


@runtime_checkable
class Fleet(Engine, Measured, Protocol):
    """See `esfast.launch.ray.RayFleet`. note: told, in words, what happens to the engines."""

    note: Callable[[str], None]

    def members(
        self, generation: int, count: int, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Iterator[MemberAnswers]:
        """Members 0 .. count - 1, each once, in the order in which they are done."""
        ...
