"""What an engine is: it turns prompts into completions under the weights as they are now.

A training loop perturbs the weights through `live_weights(...)`, calls `weights_changed()` and asks
for `generate(...)`; it knows nothing else about the engine. Nothing else edits a weight.

Contract:
- The same prompts, sampling and weights give the same tokens on the same machine and engine,
  whatever was generated before: batches are composed from the prompts alone.
- It is not promised that two engines, devices, batch sizes or thread counts give the same tokens;
  the order of floating-point sums differs between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from esfast.bounds import require_between, require_whole
from esfast.errors import ConfigError
from esfast.members import whole
from esfast.strategy import real

if TYPE_CHECKING:
    from pathlib import Path

    from esfast.live_weights import LiveWeights

Message: TypeAlias = Mapping[str, str]
"""One chat message: `{"role": "user", "content": "2 + 2?"}`."""

Prompt: TypeAlias = str | Sequence[Message]
"""What the user says (one message), or a whole conversation that ends before the answer."""

COLDEST, HOTTEST = 1e-6, 1e3
"""Temperatures of sampling: below, logits over it leave fp32; above, every token is as likely."""


def is_message(value: object) -> bool:
    """Whether it is a `Message`: a mapping with a role and a content, both texts."""
    return isinstance(value, Mapping) and all(
        isinstance(value.get(name), str) for name in ("role", "content")
    )


@dataclass(frozen=True)
class Sampling:
    """How to choose the tokens of a completion.

    `temperature=0` is greedy decoding; `top_p` and `seed` count only above it. `seed` and a
    prompt's position in the list decide its random numbers, not the batch that it falls into. A
    completion ends before the first of the `stop` texts (a special token may be one), at the
    model's end token, or after `max_new_tokens`. Raises ConfigError for a value outside its range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no engine could do."""
        require_whole(self, 1, "max_new_tokens")
        if real(self.temperature) != 0.0:
            expected = f"0 (greedy), or {COLDEST:g} to {HOTTEST:g}"
            require_between(self, "temperature", COLDEST, HOTTEST, expected)
        top_p = real(self.top_p)
        if top_p is None or not 0.0 < top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p!r}; expected more than 0 and at most 1.")
        seed = whole(self.seed)
        if seed is None:
            raise ConfigError(f"seed is {self.seed!r}; expected a whole number.")
        object.__setattr__(self, "seed", seed)  # a numpy integer overflows where it is derived from
        texts = self.stop if isinstance(self.stop, (tuple, list)) else (None,)
        if not all(isinstance(text, str) and text for text in texts):
            raise ConfigError(
                f"stop is {self.stop!r}; expected a tuple of non-empty texts, such as ('\\n',)."
            )

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken at every step."""
        return self.temperature == 0.0


@dataclass(frozen=True)
class Completion:
    """What the model answered to one prompt.

    `text`: without the prompt, special tokens and the stop text. `tokens`: how many tokens the
    model generated for it, the end token included. `finished`: it ended by itself (end token or a
    stop text) rather than at `max_new_tokens`. `ids`: the generated tokens themselves, and
    `prompt_tokens`: how many the prompt has; empty and 0 where the engine does not say.
    """

    text: str
    tokens: int
    finished: bool
    ids: tuple[int, ...] = ()
    prompt_tokens: int = 0


@runtime_checkable
class Engine(Protocol):
    """Generates text with weights that a run edits in place."""

    def live_weights(
        self, memory: str = "lean", anchor: Path | bool = False, threads: int | None = None
    ) -> LiveWeights:
        """The weights that it generates with, under their canonical names, to edit.

        memory, threads: as of `esfast.Weights`; anchor: the folder of the model that decay pulls
        to, True for a copy of the weights as they are now, False for none. The last that was asked
        for is the one that counts.
        """
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion a prompt, in the order of the prompts; an empty list for no prompts.

        Raises ConfigError where a prompt and `max_new_tokens` do not fit the model's context, and
        DataError for a prompt that is not one; in both cases before anything is generated.
        """
        ...

    def weights_changed(self) -> None:
        """Call after every edit of the weights (perturb, restore, update), before `generate`.

        The engine derives again what it computed from the weights: packed copies, prefix caches.
        """
        ...

    def close(self) -> None:
        """Give up memory and processes; a closed engine raises StateError. Twice does no harm."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """An engine that can tell, without generating, whether prompts fit the model's context."""

    def require_room(
        self, prompts: Sequence[Prompt], max_new_tokens: int, kind: str = "prompt"
    ) -> int | None:
        """Tokens that the longest of the prompts, with its answer, leaves of the context; None for
        a model without one. kind: what the prompts are, for the message.

        Raises ConfigError and DataError as `Engine.generate` does.
        """
        ...


@runtime_checkable
class Measured(Protocol):
    """An engine that has processes of its own, whose memory counts."""

    def reset_peak(self) -> bool:
        """Forgets the peaks so far; False where a process of it cannot."""
        ...

    def peak_bytes(self) -> int:
        """The peak since then, as `esfast.measure.peak_bytes` counts it."""
        ...
