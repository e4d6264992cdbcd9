"""How prior tasks are evaluated."""

from __future__ import annotations

from dataclasses import dataclass

from esfast.bounds import require_between, require_whole
from esfast.engines.base import COLDEST, HOTTEST


@dataclass(frozen=True)
class PriorSettings:
    """Every so many generations, at most `size` prompts a task, greedily and with `samples` answers
    a prompt at `temperature` (0 samples: greedily alone).

    Raises ConfigError for a value outside its range.
    """

    every: int = 5
    size: int = 64
    samples: int = 4
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        require_whole(self, 1, "every", "size", what="prior ")
        require_whole(self, 0, "samples", what="prior ")
        expected = f"{COLDEST:g} to {HOTTEST:g} (greedy answers are scored in any case)"
        require_between(self, "temperature", COLDEST, HOTTEST, expected, what="prior ")
