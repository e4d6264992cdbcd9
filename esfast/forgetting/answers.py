"""What a change of the weights did to the answers: KL and scores of one model beside its base.

    pair = Pair(base, torch.float32)
    pair.put(moment.tuned)
    pair.kl(prompts), pair.score(prompts), pair.score_base(prompts)

Two models are held at once, both in the pair's dtype: what they take is said before they are loaded
(`Pair.bytes_needed`). The base's samples are drawn once a set of prompts and used for every tuned
model, so that differences between those are not of the draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from esfast.engines.base import Prompt, Sampling
from esfast.forgetting import equal_norm
from esfast.forgetting.divergence import Sample, SampleSettings, divergence, sample
from esfast.forgetting.drift import Tensors
from esfast.forgetting.equal_norm import Moved
from esfast.forgetting.subjects import Base
from esfast.held_out import HeldOut
from esfast.models import load_model
from esfast.resources import readable, require_memory
from esfast.tasks.base import Example, Task

if TYPE_CHECKING:
    from esfast.engines.transformers import TransformersEngine

Count = Callable[[int], None]


@dataclass(frozen=True)
class PromptSet:
    """Held-out prompts of one task; kind: "target", what was trained on, or "prior".

    max_new_tokens: of a scored answer; the task's own if not given.
    """

    name: str
    kind: str
    task: Task
    examples: Sequence[Example]
    max_new_tokens: int | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """In order."""
        return [example.prompt for example in self.examples]

    @property
    def tokens(self) -> int:
        """Of a scored answer at most."""
        return self.max_new_tokens or self.task.max_new_tokens

    def first(self, count: int) -> PromptSet:
        """At most `count` of them."""
        return replace(self, examples=self.examples[:count])


class Pair:
    """A base model and one that is tuned, in `dtype`, ready to answer.

    device: of both; batch_size: rows decoded together; settings: of KL's samples.
    """

    def __init__(
        self,
        base: Base,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        batch_size: int = 32,
        settings: SampleSettings | None = None,
    ) -> None:
        self.settings = settings or SampleSettings()
        self.dtype = dtype
        if device == "cpu":
            needed = self.bytes_needed(base, dtype)
            require_memory(
                needed,
                f"holding the base and the tuned model at once as {dtype} ({readable(needed)})",
                "Give --kl-dtype bfloat16, or leave KL and scores out with --no-kl --score 0.",
            )
        self._base, self._tuned = (
            _engine(base, dtype, device, batch_size) for _ in ("base", "tuned")
        )
        self._samples: dict[str, list[Sample]] = {}
        self._base_scores: dict[str, HeldOut] = {}

    @staticmethod
    def bytes_needed(base: Base, dtype: torch.dtype) -> int:
        """What the two models take."""
        return 2 * dtype.itemsize * sum(tensor.numel() for tensor in base.tensors.values())

    @property
    def tuned(self) -> torch.nn.Module:
        """The model that `put` and `move` change."""
        return self._tuned.model

    def put(self, tensors: Tensors) -> None:
        """Makes the tuned model of these weights, rounded to the pair's dtype."""
        equal_norm.put(self.tuned, tensors)
        self._tuned.weights_changed()

    def move(self, base: Tensors, direction: Tensors, norm: Any) -> Moved:
        """Makes the tuned model `base` moved along `direction`, see `equal_norm.move`."""
        done = equal_norm.move(self.tuned, base, direction, norm)
        self._tuned.weights_changed()
        return done

    def kl(
        self, prompts: PromptSet, generation: int | None = None, after: Count = lambda n: None
    ) -> list[dict[str, Any]]:
        """Both directions: two KL records of the package's head."""
        if prompts.name not in self._samples:
            self._samples[prompts.name] = sample(self._base, prompts.prompts, self.settings)
        drawn = self._samples[prompts.name]
        both = divergence(
            self._base,
            self._tuned,
            prompts.prompts,
            self.settings,
            base_samples=drawn,
            after=after,
        )
        named = {"generation": generation, "prompts": prompts.name, "kind": prompts.kind}
        return [{**named, **one.record()} for one in both]

    def score(self, prompts: PromptSet, generation: int | None = None) -> dict[str, Any]:
        """Greedy answers of the tuned model: a SCORE record of the package's head."""
        return _score_record(prompts, _answered(self._tuned, prompts), generation)

    def score_base(self, prompts: PromptSet) -> dict[str, Any]:
        """The same of the base; answered once a set."""
        if prompts.name not in self._base_scores:
            self._base_scores[prompts.name] = _answered(self._base, prompts)
        return _score_record(prompts, self._base_scores[prompts.name], None)

    def record(self) -> dict[str, Any]:
        """How KL was sampled: "samples" of the package's head."""
        return {
            "temperature": 1.0,
            **vars(self.settings),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def _engine(base: Base, dtype: torch.dtype, device: str, batch_size: int) -> TransformersEngine:
    loaded = load_model(base.name, dtype=dtype, device=device)
    # After load_model, which says what to install where transformers is missing.
    from esfast.engines.transformers import TransformersEngine

    return TransformersEngine(loaded.model, loaded.tokenizer, batch_size=batch_size)


def _answered(engine: TransformersEngine, prompts: PromptSet) -> HeldOut:
    answers = engine.generate(prompts.prompts, Sampling(prompts.tokens))
    texts = [answer.text for answer in answers]
    scores = prompts.task.score_all(prompts.examples, texts)
    return HeldOut(0, tuple(scores), tuple(texts))


def _score_record(prompts: PromptSet, held_out: HeldOut, generation: int | None) -> dict[str, Any]:
    named = {"prompts": prompts.name, "kind": prompts.kind}
    record = held_out.record()
    limit = {"max_new_tokens": prompts.tokens}
    return {**named, "count": record.pop("prompts"), **record, **limit, "generation": generation}
