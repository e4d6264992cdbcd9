"""Which member of a population sees which prompt.

With K prompts, the pair p of a population (members 2p and 2p + 1, which share their noise with
opposite signs; without pairs, member p) answers problem i of the batch under prompt

    (p + i) mod K

so that of a problem's answers each prompt gets its K-th part, to within one pair, and a pair's two
answers differ by its noise alone. All answers to a problem are one group for the fitness, whatever
their prompt:

    F_n = mean over i of (r_ni - mean_n r_ni) / std_n r_ni, scaled to unit variance

which is `esfast.shaping.group_centered` of the rewards [population, problems]. With K = 1 this is
the ordinary generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from esfast.engines.base import Completion, Sampling
from esfast.fast_slow.instructed import under
from esfast.rollout import Rollout
from esfast.tasks.base import Example

SEEDS_APART = 1 << 32
"""Between the calls of a member: a problem has the same draws for all members, and its own."""


def prompt_number(number: int, antithetic: bool, problem: int, prompts: int) -> int:
    """Which of the `prompts` member `number` answers problem `problem` under; all count from 0."""
    pair = number // 2 if antithetic else number
    return (pair + problem) % prompts


class SplitRollout(Rollout):
    """Asks every problem under the `instructions` in turn."""

    instructions: tuple[str, ...] = ()

    def complete(
        self, number: int, batch: Sequence[Example], sampling: Sampling
    ) -> list[Completion]:
        """A call of the engine a prompt, which then computes its tokens once for all its problems
        (SmolLM2, 32 problems, prompts of 9 to 255 tokens: 2.7 s of a core rather than 8.4)."""
        count, antithetic = len(self.instructions), self.config.strategy.antithetic
        found: dict[int, Completion] = {}
        for first in range(min(count, len(batch))):  # problems first, first + count, ... share it
            places = range(first, len(batch), count)
            prompt = self.instructions[prompt_number(number, antithetic, first, count)]
            asked = [example.prompt for example in under([batch[at] for at in places], prompt)]
            drawn = replace(sampling, seed=(sampling.seed + first * SEEDS_APART) % 2**64)
            found.update(zip(places, self.engine.generate(asked, drawn), strict=True))
        return [found[at] for at in range(len(batch))]
