"""KL in both directions, against exact enumeration; intervals against known distributions."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tiny_models import byte_tokenizer, gpt2, llama

from esfast import ConfigError, DataError
from esfast.engines.transformers import TransformersEngine
from esfast.forgetting.divergence import (
    BASE_TUNED,
    TUNED_BASE,
    Sample,
    SampleSettings,
    divergence,
    sample,
)
from esfast.forgetting.intervals import mean_of, ratio_of, t95

TOKENIZER = byte_tokenizer()
PROMPTS = ["one", "a longer second prompt", "3"]


def engine(model) -> TransformersEngine:
    return TransformersEngine(model, TOKENIZER)


def moved(model, scale: float):
    """A copy with every weight moved by noise."""
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return other


def log_probabilities(model, rows: list[list[int]]) -> torch.Tensor:
    """float64 [rows, vocabulary] after rows of one length."""
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor(rows)).logits[:, -1].double(), -1)


def enumerated(p, q, prompt: list[int], end: int = 2) -> tuple[float, float]:
    """(nats, tokens) expected of answers of at most two tokens, summed over all 259 + 258 * 259."""
    first = [log_probabilities(model, [prompt])[0] for model in (p, q)]
    nats = float((first[0].exp() * (first[0] - first[1])).sum())
    going_on = [token for token in range(259) if token != end]
    rows = [[*prompt, token] for token in going_on]
    second = [log_probabilities(model, rows) for model in (p, q)]
    inner = (second[0].exp() * (second[0] - second[1])).sum(-1)
    weights = first[0].exp()[going_on]
    return nats + float(weights @ inner), 1 + float(weights.sum())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_both_estimators_find_the_enumerated_divergence(make):
    base = make()
    tuned = moved(base, 0.05)
    engines = engine(base), engine(tuned)
    ids = engines[0].token_ids(PROMPTS[:2])
    found = divergence(*engines, PROMPTS[:2], SampleSettings(2, samples_per_prompt=150))
    for result, p, q in zip(found, (base, tuned), (tuned, base), strict=True):
        truth = [enumerated(p, q, prompt) for prompt in ids]
        nats = sum(n for n, _ in truth) / 2
        tokens = sum(t for _, t in truth) / 2
        assert result.exact.sequence.value == pytest.approx(nats, rel=0.05)
        assert result.log_ratio.sequence.value == pytest.approx(nats, rel=0.25)
        assert result.exact.token_weighted.value == pytest.approx(nats / tokens, rel=0.05)
        assert result.tokens == pytest.approx(300 * tokens, rel=0.03)
        assert nats > 0.01


def test_the_sum_over_the_vocabulary_varies_less_than_the_log_ratio():
    base = llama()
    pair = engine(base), engine(moved(base, 0.05))
    runs = [
        divergence(*pair, PROMPTS, SampleSettings(4, samples_per_prompt=2, seed=n))[0]
        for n in range(12)
    ]
    exact = np.std([run.exact.token_weighted.value for run in runs])
    plain = np.std([run.log_ratio.token_weighted.value for run in runs])
    assert exact < 0.5 * plain


def test_a_model_diverges_from_itself_by_nothing():
    base = llama()
    for result in divergence(engine(base), engine(base), PROMPTS, SampleSettings(6)):
        for estimates in (result.exact, result.log_ratio):
            values = [e.record() for e in vars(estimates).values()]
            assert values == [{"value": 0.0, "low": 0.0, "high": 0.0}] * 3


def test_directions_are_named_and_sampled_as_they_say():
    base = llama()
    pair = engine(base), engine(moved(base, 0.1))
    settings = SampleSettings(5, samples_per_prompt=3, seed=4)
    forward, backward = divergence(*pair, PROMPTS, settings)
    assert (forward.direction, forward.samples_from) == (BASE_TUNED, "base")
    assert (backward.direction, backward.samples_from) == (TUNED_BASE, "tuned")
    assert forward.count == backward.count == 3
    exchanged = divergence(pair[1], pair[0], PROMPTS, settings)
    assert exchanged[1].exact == forward.exact and exchanged[0].exact == backward.exact
    assert forward.exact != backward.exact
    again = divergence(*pair, PROMPTS, settings, base_samples=sample(pair[0], PROMPTS, settings))
    assert again == (forward, backward)


def test_a_batch_of_uneven_prompts_gives_what_each_gives_alone(monkeypatch):
    """Padding left and right, and cuts into batches, do not leak into the sums."""
    from esfast.forgetting import divergence as module

    base = llama()
    p, q = base, moved(base, 0.1)
    samples = [Sample(0, (9, 8, 7, 6, 5), (4, 5, 6)), Sample(1, (30,), (7,)),
               Sample(2, tuple(range(20, 40)), (90, 91))]  # fmt: skip
    together = module._sums(p, q, samples, lambda n: None)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 1)
    alone = module._sums(p, q, samples, lambda n: None)
    assert together == pytest.approx(alone, rel=1e-4)
    log_p = [log_probabilities(m, [[9, 8, 7, 6, 5]])[0] for m in (p, q)]
    first = float((log_p[0].exp() * (log_p[0] - log_p[1])).sum())
    single = module._sums(p, q, [Sample(0, (9, 8, 7, 6, 5), (4,))], lambda n: None)
    assert single[0] == pytest.approx([first, float(log_p[0][4] - log_p[1][4])], rel=1e-4)


def test_means_over_tokens_prompts_and_answers_are_different_means():
    from esfast.forgetting.divergence import _estimates

    sums, lengths = np.array([1.0, 3.0, 10.0, 2.0]), np.array([1.0, 1.0, 10.0, 2.0])
    found = _estimates(sums, lengths, np.array([0, 0, 1, 1]))
    assert found.token_weighted.value == pytest.approx(16 / 14)
    assert found.prompt_averaged.value == pytest.approx((2 + 1) / 2)
    assert found.sequence.value == pytest.approx((2 + 6) / 2)


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.7062), (5, 2.5706), (11, 2.20099),
                                                   (30, 2.04227), (200, 1.97190)])  # fmt: skip
def test_student_quantiles(freedom, expected):
    assert t95(freedom) == pytest.approx(expected, rel=1e-4)


def test_intervals_cover_what_they_estimate():
    """95 % of 2000 intervals from 12 prompts hold the truth, to four standard errors."""
    draws = np.random.default_rng(0)
    means, ratios = 0, 0
    for _ in range(2000):
        weights = draws.uniform(5, 15, size=12)
        values = weights * 0.7 + draws.normal(size=12)
        mean, ratio = mean_of(values), ratio_of(values, weights)
        means += mean.low <= 7.0 <= mean.high
        ratios += ratio.low <= 0.7 <= ratio.high
    spread = 4 * math.sqrt(0.05 * 0.95 / 2000)
    assert abs(means / 2000 - 0.95) < spread and abs(ratios / 2000 - 0.95) < spread


def test_what_cannot_be_compared_is_refused():
    base = engine(llama())
    with pytest.raises(ConfigError, match="1 prompt has no spread"):
        divergence(base, base, PROMPTS[:1], SampleSettings(2))
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        SampleSettings(0)
    broken = moved(llama(), 0.0)
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    drawn = sample(base, PROMPTS, SampleSettings(2))
    with pytest.raises(DataError, match="logits are not finite"):
        divergence(base, engine(broken), PROMPTS, SampleSettings(2), base_samples=drawn)


def test_the_default_device_of_others_is_not_asked():
    base, settings = llama(), SampleSettings(max_new_tokens=4)
    tuned = moved(base, 0.05)

    def measured():
        return divergence(engine(base), engine(tuned), PROMPTS, settings)

    with torch.device("meta"):
        got = measured()
    assert got == measured()
