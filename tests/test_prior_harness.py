"""Tasks of lm-evaluation-harness as prior tasks: they score the live model and leave it alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from number_engine import NumberEngine
from test_prior_tasks import FEW

from esfast import ConfigError, EsfastError, Weights
from esfast.prior import PriorSettings, make_prior_task

CHOICES = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
TEXT = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ROWS = [("ab", ["c", "d"], 0), ("xyz", ["one", "two", "three"], 2), ("q", ["no", "yes"], 1)]


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("lm_eval")
    import tiny_models

    from esfast.engines.transformers import TransformersEngine

    return TransformersEngine(tiny_models.llama(), tiny_models.byte_tokenizer(), batch_size=4)


@pytest.fixture
def yaml(tmp_path, monkeypatch) -> Path:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    cache = pytest.importorskip("datasets").config  # which reads the environment once
    monkeypatch.setattr(cache, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.dumps({"q": q, "choices": c, "gold": g}) for q, c, g in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    for name, text in (("choose", CHOICES), ("write", TEXT)):
        made = text.format(name=f"tiny_{name}", file=tmp_path / "rows.jsonl")
        (tmp_path / f"{name}.yaml").write_text(made)
    return tmp_path


def by_hand(engine, context: str, continuation: str) -> float:
    """log p(continuation | context), summed over its tokens."""
    ids = [engine.tokenizer(text)["input_ids"] for text in (context, context + " " + continuation)]
    logits = engine.model(torch.tensor([ids[1]])).logits.log_softmax(-1)[0]
    return sum(logits[at - 1, ids[1][at]].item() for at in range(len(ids[0]), len(ids[1])))


def test_lm_evals_tasks_score_the_live_model(engine, yaml):
    prior = make_prior_task(str(yaml / "choose.yaml"), PriorSettings(size=10, samples=2))
    with torch.inference_mode():
        likely = [max(c, key=lambda one: by_hand(engine, q, one)) for q, c, _ in ROWS]
    expected = [float(best == c[gold]) for best, (_, c, gold) in zip(likely, ROWS, strict=True)]
    state = Weights(engine.table()).checksum()
    (found,) = prior.evaluate(engine, 0)
    assert (found.task, found.metric, found.prompts) == ("tiny_choose", "acc,none", 3)
    assert found.greedy.values == tuple(expected) and found.sampled is None
    texts = [f"{q} {choice}" for q, choices, _ in ROWS for choice in choices]
    read = sum(len(engine.tokenizer(text)["input_ids"]) - 1 for text in texts)
    assert (found.read_tokens, found.generated_tokens) == (read, 0)
    assert Weights(engine.table()).checksum() == state
    with torch.no_grad():  # the same object, so an edit is seen: now the other end of the ranking
        engine.model.lm_head.weight.neg_()
    try:
        (turned,) = prior.evaluate(engine, 1)
    finally:
        with torch.no_grad():
            engine.model.lm_head.weight.neg_()
    assert turned.greedy.values != found.greedy.values


def test_lm_evals_generating_tasks_are_sampled_too(engine, yaml):
    settings = PriorSettings(size=10, samples=3, seed=7)
    prior = make_prior_task(str(yaml / "write.yaml"), settings)
    generator, side = torch.get_rng_state(), engine.tokenizer.padding_side
    first, again = prior.evaluate(engine, 0)[0], prior.evaluate(engine, 0)[0]
    assert first.metric == "exact_match,none" and len(first.sampled.values) == 3
    assert (first.sampled.samples, first.sampled.temperature) == (3, 1.0)
    assert replace(first, seconds=0.0) == replace(again, seconds=0.0)
    read = sum(len(engine.tokenizer(q)["input_ids"]) for q, _, _ in ROWS)
    assert first.read_tokens == (1 + 3) * read
    assert (1 + 3) * len(ROWS) <= first.generated_tokens <= 4 * (1 + 3) * len(ROWS)
    assert torch.equal(torch.get_rng_state(), generator) and engine.tokenizer.padding_side == side


def test_samples_of_lm_evals_tasks_are_drawn(engine, yaml, monkeypatch):
    """A uniform model: greedy answers are one text, samples are not."""
    from esfast.prior import harness

    prior = make_prior_task(str(yaml / "write.yaml"), PriorSettings(size=10, samples=1))
    answers: list[list[str]] = []
    evaluate = harness._run

    def watch(model, tasks, size):
        ask = model.generate_until

        def told(requests, *rest, **more):
            answers.append(ask(requests, *rest, **more))
            return answers[-1]

        model.generate_until = told
        try:
            return evaluate(model, tasks, size)
        finally:
            del model.generate_until

    monkeypatch.setattr(harness, "_run", watch)
    weight = engine.model.lm_head.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(0.01)
        prior.evaluate(engine, 0)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    greedy, sampled = answers
    assert sampled != greedy


def test_a_folder_of_tasks_may_be_given(engine, yaml):
    prior = make_prior_task("tiny_write", PriorSettings(size=2, samples=0), yaml)
    (found,) = prior.evaluate(engine, 0)
    assert (found.task, found.prompts, found.sampled) == ("tiny_write", 2, None)
    with pytest.raises(ConfigError, match="is no folder"):
        make_prior_task("tiny_write", FEW, yaml / "nowhere")
    with pytest.raises(EsfastError, match="could not be loaded by lm-eval"):
        (yaml / "broken.yaml").write_text(CHOICES.format(name="broken", file="no.jsonl"))
        make_prior_task(str(yaml / "broken.yaml"), FEW)


@pytest.mark.slow
def test_lm_evals_own_names_are_known(yaml):
    """Its index takes seconds; no data of its tasks is here, and that is what is said."""
    pytest.importorskip("lm_eval")
    with pytest.raises(EsfastError, match="could not be loaded by lm-eval"):
        make_prior_task("lm_eval:hellaswag", FEW)
    with pytest.raises(ConfigError, match="lm-eval has none of that name"):
        make_prior_task("hellaswagg", FEW)


def test_lm_evals_tasks_need_a_model_of_transformers(yaml):
    pytest.importorskip("lm_eval")
    prior = make_prior_task(str(yaml / "choose.yaml"), FEW)
    with pytest.raises(ConfigError, match="the engine is NumberEngine"):
        prior.evaluate(NumberEngine(), 0)
