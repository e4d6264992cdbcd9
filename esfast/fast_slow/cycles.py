"""What a cycle's fast phase found, as prompts.jsonl of a run's folder keeps it: a line a cycle.

The file is replaced at once, before the cycle's first generation: a run that was stopped reads back
the prompts of a cycle that has a line, and evolves those of one that has none again, from the same
weights and seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from esfast.cost import Tokens
from esfast.errors import DataError
from esfast.run_folder import read_lines

PROMPTS = "prompts.jsonl"
HELD_OUT_PROMPT = "held_out_best_prompt"
"""Of a line of metrics.jsonl and the summary, beside "held_out"."""


@dataclass(frozen=True)
class Candidate:
    """An instruction of GEPA's pool. score: mean over the problems that candidates are scored on;
    best_on: on how many of them none is better (above 0: it is on the Pareto front, as GEPA keeps
    it: ties count, and one that another equals or beats on every problem may be there); parent: the
    place in the pool of what it was made from; kept: for the slow phase."""

    text: str
    score: float
    best_on: int
    parent: int | None = None
    kept: bool = False


@dataclass(frozen=True)
class Cycle:
    """One fast phase.

    generation: how many were over when it began; problems: distinct ones of the cycle's batches,
    scored_on: those of them that candidates are scored on; metric_calls: answers scored for it;
    reflections: instructions asked for, failed: those that came to nothing, by reason; tokens: of
    answers and reflections; seconds; held_out: `HeldOut.record()` under the best prompt before
    the slow phase, held_out_tokens: what that took; gepa: the package's version.
    """

    cycle: int
    generation: int
    problems: int
    scored_on: int
    metric_calls: int
    reflections: int
    failed: tuple[Mapping[str, Any], ...]
    tokens: Tokens
    seconds: float
    candidates: tuple[Candidate, ...]
    held_out: Mapping[str, Any] | None = None
    held_out_tokens: Tokens = field(default_factory=Tokens)
    gepa: str | None = None
    prompts: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", best_first(self.candidates))

    def record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "failed": [dict(reason) for reason in self.failed]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Cycle:
        """The inverse of `record`. Raises KeyError, TypeError, ValueError."""
        given = {name: value for name, value in record.items() if name != "prompts"}
        given["tokens"] = Tokens(**record["tokens"])
        given["held_out_tokens"] = Tokens(**record.get("held_out_tokens", {}))
        given["candidates"] = tuple(Candidate(**candidate) for candidate in record["candidates"])
        given["failed"] = tuple(record["failed"])
        made = cls(**given)
        if list(made.prompts) != list(record["prompts"]) or not made.prompts:
            raise ValueError("its prompts are not those of its candidates")
        return made


def best_first(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """The kept instructions, the best first; ties in the pool's order."""
    kept = sorted((c for c in candidates if c.kept), key=lambda c: -c.score)
    return tuple(candidate.text for candidate in kept)


def read_cycles(folder: Path) -> list[Cycle]:
    """The cycles that a run's folder has so far. Raises DataError where the file is damaged."""
    path = folder / PROMPTS
    if not path.exists():
        return []
    try:
        cycles = [Cycle.from_record(record) for record in read_lines(path)]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} has a line that is no cycle's ({error}).") from None
    if [cycle.cycle for cycle in cycles] != list(range(len(cycles))):
        raise DataError(f"{path} has not one line a cycle, from the first on.")
    return cycles


def cycles_until(folder: Path, done: int, each: int) -> list[Cycle]:
    """The cycles of a run that goes on after generation `done`, `each` of them a cycle. DataError
    where one is missing whose generations are in the journal: its prompts cannot be made again."""
    cycles = [cycle for cycle in read_cycles(folder) if cycle.generation <= done]
    needed = -(-done // each)
    if len(cycles) < needed:
        raise DataError(
            f"{folder / PROMPTS} has {len(cycles)} cycles, and the journal is {done} generations "
            f"long, in cycle {needed}: its prompts are lost with it, and the run cannot go on. Put "
            "the file back, or start a new run."
        )
    return cycles
