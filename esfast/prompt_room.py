"""Whether the prompts of a run fit the model's context, asked before the run's folder is made.

All held-out prompts, those of esfast's own prior tasks, and the training prompts that the run will
deal, up to LOOKED_AT of them. The first generation's are counted in tokens; of later ones only
those with more bytes of text than the longest of the first left tokens (a token of today's
tokenizers has a byte of text or more). Not promised: that nothing is too long after that; the
engine refuses it where it is met. lm-evaluation-harness cuts its own prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from esfast.engines.base import Bounded, Engine, Prompt, Sampling
from esfast.prior import PriorTasks
from esfast.prior.evaluation import OwnTask
from esfast.tasks.base import Task

LOOKED_AT = 10_000  # prompts: small sums take 0.03 s on one core, Countdown's to make 4 s


class Deals(Protocol):
    """What the settings of both methods say of prompts; see TrainConfig and GrpoConfig."""

    @property
    def sampling(self) -> Sampling: ...
    @property
    def generations(self) -> int: ...
    @property
    def prompts(self) -> int: ...
    @property
    def fixed_prompts(self) -> bool: ...
    @property
    def eval_size(self) -> int: ...


@dataclass(frozen=True)
class Dealt:
    """Which prompts a run deals: its settings, and the seed that they are drawn by."""

    config: Deals
    seed: int

    def batches(self, task: Task) -> Iterator[list[Prompt]]:
        """The training prompts, a generation at a time: LOOKED_AT at most, or one generation."""
        config = self.config
        last = 1 if config.fixed_prompts else config.generations
        for generation in range(min(last, max(1, LOOKED_AT // config.prompts))):
            batch = task.train_batch(self.seed, generation, config.prompts)
            yield [example.prompt for example in batch]


def require_prompts_fit(engine: Engine, task: Task, dealt: Dealt, prior: PriorTasks) -> None:
    """Raises ConfigError that names the prompt, its tokens and the context; DataError for what is
    no prompt. An engine that cannot tell is not asked."""
    if not isinstance(engine, Bounded):
        return
    limit = dealt.config.sampling.max_new_tokens
    held_out = [example.prompt for example in task.held_out(dealt.config.eval_size)]
    engine.require_room(held_out, limit, "held-out prompt")
    for own in prior.tasks:
        if isinstance(own, OwnTask):
            own.require_room(engine)
    batches = dealt.batches(task)
    left = engine.require_room(next(batches), limit, "training prompt")
    if left is not None:
        _require_later(engine, batches, limit, left)


def _require_later(engine: Bounded, batches: Iterator[list[Prompt]], limit: int, left: int) -> None:
    """Of the second generation on; a prompt that comes again is not looked at again."""
    seen: set[str] = set()
    for number, batch in enumerate(batches, start=2):
        long = {text for text in map(_text, batch) if len(text.encode(errors="replace")) > left}
        if long - seen:
            engine.require_room(batch, limit, f"generation {number}: training prompt")
            seen |= long


def _text(prompt: Prompt) -> str:
    """What is said, and a place for what a template writes around each message but one."""
    return prompt if isinstance(prompt, str) else (" " * 32).join(m["content"] for m in prompt)
