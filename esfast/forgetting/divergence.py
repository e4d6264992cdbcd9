"""KL between a base and a tuned model on the answers that one of them gives.

    KL(base || tuned) = E_{y ~ base} sum_t sum_v p_t(v) log(p_t(v) / q_t(v))
    KL(tuned || base) = the same with the parts exchanged, y ~ tuned

p_t is what the model that answers says of token t, q_t what the other says of it, both after the
prompt and y_<t.

Answers are sampled at temperature 1 from the whole vocabulary and end at an end token or after
`max_new_tokens` (what would have followed is not counted). Two estimators of each:

    exact      the inner sum over the vocabulary at every sampled prefix: Rao-Blackwell's
               improvement of the other, never negative; the number to report
    log_ratio  log p(y_t) - log q(y_t) of the sampled token: what most reports use

and three means of each, in nats: a token (all tokens weigh the same), a token averaged prompt by
prompt (all prompts do), and a whole answer. arXiv 2605.30148 reports KL(base || tuned).
Logits are taken in the models' dtype and summed in fp64. Give fp32 models: a model computed in
bfloat16 diverges from itself in fp32 by 1.1e-3 nats a token (SmolLM2-135M).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from esfast.bounds import require_whole
from esfast.engines.base import Prompt, Sampling
from esfast.errors import DataError
from esfast.forgetting.intervals import Estimate, mean_of, ratio_of

if TYPE_CHECKING:
    from esfast.engines.transformers import TransformersEngine

BASE_TUNED, TUNED_BASE = "KL(base || tuned)", "KL(tuned || base)"
# Logits of one model held at once: 2^24 in fp32 are 64 MB.
LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class SampleSettings:
    """How answers are sampled: tokens at most, answers a prompt, and the random numbers' seed."""

    max_new_tokens: int = 32
    samples_per_prompt: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole(self, 1, "max_new_tokens", "samples_per_prompt")


@dataclass(frozen=True)
class Sample:
    """One sampled answer: its prompt's place in the list, and the tokens of both."""

    place: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Estimates:
    """One estimator: nats a token over all tokens, over prompts, and nats an answer."""

    token_weighted: Estimate
    prompt_averaged: Estimate
    sequence: Estimate

    def record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: estimate.record() for name, estimate in vars(self).items()}


@dataclass(frozen=True)
class Divergence:
    """One direction on one set of prompts; `tokens` are those sampled, over all prompts."""

    direction: str
    samples_from: str
    count: int
    tokens: int
    exact: Estimates
    log_ratio: Estimates

    def record(self) -> dict[str, Any]:
        """Plain JSON values: KL of the package's head, without generation, prompts and kind."""
        estimates = {"exact": self.exact.record(), "log_ratio": self.log_ratio.record()}
        return {**vars(self), **estimates}


def divergence(
    base: TransformersEngine,
    tuned: TransformersEngine,
    prompts: Sequence[Prompt],
    settings: SampleSettings | None = None,
    *,
    base_samples: Sequence[Sample] | None = None,
    after: Callable[[int], None] = lambda answers: None,
) -> tuple[Divergence, Divergence]:
    """(KL(base || tuned), KL(tuned || base)) over `prompts`, both models as they are now.

    base_samples: what `sample(base, prompts, settings)` gave before, to spare it here. after:
    called with the answers scored. Both engines need one tokenizer. ConfigError for fewer than two
    prompts, DataError for logits that are not finite.
    """
    chosen = settings or SampleSettings()
    drawn = sample(base, prompts, chosen) if base_samples is None else base_samples
    forward = _direction(BASE_TUNED, "base", (base, tuned), drawn, after)
    drawn = sample(tuned, prompts, chosen)
    backward = _direction(TUNED_BASE, "tuned", (tuned, base), drawn, after)
    return forward, backward


def sample(
    engine: TransformersEngine, prompts: Sequence[Prompt], settings: SampleSettings
) -> list[Sample]:
    """Answers of the engine's model to `prompts` at temperature 1, in order."""
    many = [prompt for prompt in prompts for _ in range(settings.samples_per_prompt)]
    drawn = Sampling(settings.max_new_tokens, temperature=1.0, seed=settings.seed)
    answers = engine.generate(many, drawn)
    ids = [tuple(row) for row in engine.token_ids(prompts)]
    return [
        Sample(at // settings.samples_per_prompt, ids[at // settings.samples_per_prompt], a.ids)
        for at, a in enumerate(answers)
    ]


def _direction(
    direction: str,
    samples_from: str,
    pair: tuple[TransformersEngine, TransformersEngine],
    samples: Sequence[Sample],
    after: Callable[[int], None],
) -> Divergence:
    rows = _sums(pair[0].model, pair[1].model, samples, after)
    places = np.array([s.place for s in samples])
    lengths = np.array([len(s.answer) for s in samples], dtype=np.float64)
    return Divergence(
        direction,
        samples_from,
        count=len(set(places.tolist())),
        tokens=int(lengths.sum()),
        exact=_estimates(rows[:, 0], lengths, places),
        log_ratio=_estimates(rows[:, 1], lengths, places),
    )


def _estimates(sums: np.ndarray, lengths: np.ndarray, places: np.ndarray) -> Estimates:
    """sums, lengths: [samples], of an answer's tokens; places: which prompt each answers."""
    _, groups = np.unique(places, return_inverse=True)
    answers = np.bincount(groups)
    total, tokens = (np.bincount(groups, weights=values) for values in (sums, lengths))
    each = np.bincount(groups, weights=sums / lengths) / answers
    return Estimates(ratio_of(total, tokens), mean_of(each), mean_of(total / answers))


def _sums(p: Any, q: Any, samples: Sequence[Sample], after: Callable[[int], None]) -> np.ndarray:
    """float64 [samples, 2]: sums over an answer's tokens of exact KL and log-ratio."""
    out = np.zeros((len(samples), 2))
    order = sorted(range(len(samples)), key=lambda at: len(samples[at].prompt))
    longest = max((len(s.answer) for s in samples), default=1)
    step = max(1, LOGITS_AT_ONCE // (longest * int(p.config.get_text_config().vocab_size)))
    for start, end in pairwise([*range(0, len(order), step), len(order)]):
        batch = [samples[at] for at in order[start:end]]
        logits = [_logits(model, batch) for model in (p, q)]
        for row, at in enumerate(order[start:end]):
            out[at] = _answer_sums(logits[0][row], logits[1][row], samples[at].answer)
        after(end)
    if not np.isfinite(out).all():
        raise DataError(
            "a model's logits are not finite on the sampled answers; its weights hold values that "
            "are not, or overflow in this dtype. Look at the drift, or compare in float32."
        )
    return out


def _answer_sums(p: torch.Tensor, q: torch.Tensor, answer: Sequence[int]) -> tuple[float, float]:
    """Of one answer, from logits [longest answer, vocabulary]: exact KL and log-ratio."""
    p, q = (torch.log_softmax(x[: len(answer)].double(), dim=-1) for x in (p, q))
    ratio = p - q
    chosen = ratio.gather(1, torch.tensor(answer, device=ratio.device)[:, None])
    return float((p.exp() * ratio).sum()), float(chosen.sum())


@torch.inference_mode()
def _logits(model: Any, batch: Sequence[Sample]) -> torch.Tensor:
    """[batch, longest answer, vocabulary]: what the model says before each of an answer's tokens.

    Prompts are padded on the left and answers on the right, so that the answers lie in one block.
    """
    widest = max(len(s.prompt) for s in batch)
    longest = max(len(s.answer) for s in batch)
    ids = torch.zeros((len(batch), widest + longest), dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for row, s in enumerate(batch):
        span = slice(widest - len(s.prompt), widest + len(s.answer))
        ids[row, span] = torch.tensor([*s.prompt, *s.answer], device="cpu")
        mask[row, span] = 1
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False}
    if "position_ids" in accepted:
        options["position_ids"] = positions.to(model.device)
    block = torch.arange(widest - 1, widest + longest - 1, device=model.device)
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = block
    out = model(ids.to(model.device), attention_mask=mask.to(model.device), **options)
    logits: torch.Tensor = out.logits
    return logits if logits.shape[1] == longest else logits[:, block]
