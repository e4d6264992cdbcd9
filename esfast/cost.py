"""What a training run computed, counted the same way for every method: tokens, FLOPs, time, memory.

    forward FLOPs  = 2 * parameters * tokens that went forward
    backward FLOPs = 4 * parameters * tokens that went backward

(a multiply and an add a weight and token; backward twice that, for the gradients of activations and
of weights: Kaplan et al., arXiv 2001.08361, section 2.1). All parameters count, a matrix that is
embedding and output at once counts once. Tokens are those of prompts and answers, each row's own:

    evolution strategies  every member reads every prompt and generates its answer: forward only
    GRPO                  every completion reads its prompt and is generated: forward; then prompt
                          and completion go forward and backward once an iteration, forward once
                          more where the old policy is needed (iterations > 1) and once more
                          through the reference model where beta > 0

Left out: attention's own products, which grow with the square of the length (1 % of the rest for
SmolLM2-135M at 50 tokens, 4 * layers * hidden * context FLOPs a token); padding, and what is saved
by computing a common prompt prefix once; the optimiser's and the perturbations' passes over the
weights, which are bound by memory and are in the seconds. What was spent on measuring is counted
apart, held-out prompts and prior tasks each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FORWARD = 2
BACKWARD = 4
FORMULA = (
    "forward FLOPs = 2 * parameters * (prompt + generated + reread tokens), backward FLOPs = 4 * "
    "parameters * backward tokens; attention's products, padding and passes over the weights alone "
    "left out, common prompt prefixes counted in every row"
)


@dataclass
class Tokens:
    """Tokens through the model: `prompt` read, `generated`, `reread` forward by an optimiser (old
    policy and reference model included), `backward`."""

    prompt: int = 0
    generated: int = 0
    reread: int = 0
    backward: int = 0

    def flops(self, parameters: int) -> tuple[int, int]:
        """(forward, backward) of a model of `parameters` weights; see the module."""
        forward = self.prompt + self.generated + self.reread
        return FORWARD * parameters * forward, BACKWARD * parameters * self.backward

    def record(self, parameters: int) -> dict[str, int]:
        """Plain JSON values."""
        forward, backward = self.flops(parameters)
        return {
            **vars(self),
            "forward_flops": forward,
            "backward_flops": backward,
            "flops": forward + backward,
        }


@dataclass
class Account:
    """A run's tokens so far; `parameters` of the model, tied ones once. `search`: of prompts that
    evolve beside the weights (esfast fast-slow), None elsewhere. `known`: False where an earlier
    part of the run, or the engine, did not say how many there were."""

    parameters: int = 0
    training: Tokens = field(default_factory=Tokens)
    evaluation: Tokens = field(default_factory=Tokens)
    search: Tokens | None = None
    known: bool = True

    def counts(self) -> dict[str, Any] | None:
        """What a metrics line holds as "cost"."""
        if not self.known:
            return None
        parts = {"training": self.training, "evaluation": self.evaluation, "search": self.search}
        return {name: dict(vars(tokens)) for name, tokens in parts.items() if tokens is not None}

    def go_on(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Goes on from the metrics lines of an earlier part of the run."""
        counts = lines[-1].get("cost") if lines else self.counts()
        self.known = counts is not None
        if counts is not None:
            self.training = Tokens(**counts["training"])
            self.evaluation = Tokens(**counts["evaluation"])

    def read(self, tokens: Tokens, prompt: int, generated: int) -> None:
        """Adds prompts read and answers generated to `tokens`, which is one of the two parts."""
        self.known = self.known and prompt > 0  # no prompt is empty: the engine did not say
        tokens.prompt += prompt
        tokens.generated += generated

    def record(self, prior: tuple[int, int] | None = None) -> dict[str, Any] | None:
        """summary.json's "cost"; seconds and peak memory stand beside it there.

        prior: tokens read and generated for prior tasks, None where not all of them are known.
        """
        if not self.known:
            return None
        return {
            "parameters": self.parameters,
            "training": self.training.record(self.parameters),
            "evaluation": self.evaluation.record(self.parameters),
            **({"search": self.search.record(self.parameters)} if self.search else {}),
            "prior": prior and Tokens(*prior).record(self.parameters),
            "formula": FORMULA,
        }
