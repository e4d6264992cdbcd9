"""Prior tasks: scores and intervals, what outlives a stop, lm-eval on the live model."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from test_cli import run
from test_train import NumberEngine, Targets, interrupt_at, make_trainer

from esfast import ConfigError, DataError, EsfastError, Weights
from esfast.engines.base import Completion
from esfast.held_out import wilson
from esfast.measure import LOOP, PRIOR_TASKS
from esfast.plots import draw_run
from esfast.prior import Estimate, PriorScore, PriorSettings, PriorTasks, make_prior_task, outcome
from esfast.prior.evaluation import PRIOR, OwnTask
from esfast.report import prior_lines
from esfast.run_folder import read_json, read_lines
from esfast.tasks import make_task
from esfast.tasks.questions import SETS, Questions

FEW = PriorSettings(every=2, size=4, samples=0)


def score(generation: int, values, name: str = "a", **changes) -> PriorScore:
    greedy = Estimate.of(values)
    return PriorScore(generation, name, name, "score", len(values), greedy, **changes)


# --- scores -------------------------------------------------------------------------------------


def test_intervals_are_wilsons_for_shares_and_of_the_mean_otherwise():
    share = Estimate.of([1, 1, 1, 0])
    assert (share.low, share.high) == wilson(0.75, 4)
    assert Estimate.of([1.0] * 9).low < 1.0  # all right is not certainty
    values = np.array([0.1, 0.5, 0.6, 0.9])
    mean = Estimate.of(values)
    half = 1.959964 * values.std(ddof=1) / 2
    assert (mean.low, mean.high) == pytest.approx((values.mean() - half, values.mean() + half))


def test_a_record_is_read_back():
    one = score(3, [0.25, 1.0], sampled=Estimate.of([0.5, 0.75], 4, 0.7), failed=1, seconds=2.0)
    assert PriorScore.from_record(json.loads(json.dumps(one.record()))) == one
    none = score(0, [1.0], higher_is_better=False)
    assert PriorScore.from_record(none.record()) == none


def test_dip_change_and_recovery_are_told_apart():
    levels = {0: [1, 1, 1, 0], 2: [1, 0, 0, 0], 4: [1, 1, 0, 0]}
    found = outcome([score(g, values) for g, values in reversed(levels.items())])["greedy"]
    assert (found["before"], found["worst"], found["final"]) == (0.75, 0.25, 0.5)
    assert (found["worst_generation"], found["final_generation"]) == (2, 4)
    assert (found["dip"], found["change"], found["recovery"]) == (-0.5, -0.25, 0.25)
    difference = np.array([0, 0, -1, 0])  # the final's, prompt by prompt
    half = 1.959964 * difference.std(ddof=1) / 2
    assert found["change_95"] == pytest.approx([-0.25 - half, -0.25 + half])


def test_worst_is_highest_where_lower_is_better():
    levels = {0: 10.0, 1: 30.0, 2: 12.0}
    scores = [score(g, [value, value], higher_is_better=False) for g, value in levels.items()]
    found = outcome(scores)["greedy"]
    assert (found["worst"], found["dip"], found["recovery"]) == (30.0, 20.0, -18.0)


def test_a_score_that_never_fell_has_no_dip():
    found = outcome([score(0, [0.5, 0.5]), score(1, [0.6, 0.6])])["greedy"]
    assert (found["dip"], found["worst_generation"]) == (0.0, 0)


# --- evaluation -----------------------------------------------------------------------------------


class Echo(NumberEngine):
    """Answers every prompt with what `say(prompt, sampling, place)` returns."""

    def __init__(self, say):
        super().__init__()
        self.say = say

    def generate(self, prompts, sampling):
        self.calls += 1
        self.seen.append(list(prompts))
        said = [self.say(prompt, sampling, place) for place, prompt in enumerate(prompts)]
        return [Completion(text, 1, True) for text in said]


def question_file(folder: Path, count: int = 8, name: str = "facts.jsonl") -> Path:
    rows = [{"prompt": f"Say {n}.", "answer": str(n)} for n in range(count)]
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows))
    return folder / name


def test_a_prompts_samples_count_as_one_observation(tmp_path):
    """Half the prompts always right, half never: drawing more samples tells no more."""
    settings = PriorSettings(size=8, samples=16)
    prior = make_prior_task(str(question_file(tmp_path)), settings)

    def say(prompt, sampling, place):
        return prompt.split()[1].strip(".") if int(prompt.split()[1][0]) < 4 else "no"

    engine = Echo(say)
    (found,) = prior.evaluate(engine, 0)
    assert found.task == "facts" and found.prompts == 8
    assert [len(seen) for seen in engine.seen] == [8, 128]
    assert found.greedy.score == found.sampled.score == 0.5
    assert (found.sampled.low, found.sampled.high) == (found.greedy.low, found.greedy.high)
    assert (found.sampled.samples, found.sampled.temperature) == (16, 1.0)


def test_samples_are_put_to_their_own_prompt(tmp_path):
    prior = make_prior_task(str(question_file(tmp_path, 4)), PriorSettings(size=4, samples=3))

    def say(prompt, sampling, place):
        right = sampling.greedy or place % 3 < int(prompt.split()[1][0])
        return prompt if right else "?"

    (found,) = prior.evaluate(Echo(say), 0)
    prompts = [example.prompt for example in prior.task.held_out(4)]
    expected = [min(int(prompt.split()[1][0]), 3) / 3 for prompt in prompts]
    assert found.sampled.values == pytest.approx(tuple(expected))


def priors(settings=FEW, *names) -> PriorTasks:
    return PriorTasks([OwnTask(n, Targets(), settings) for n in names or ("a", "b")], settings)


def test_what_is_recorded_is_not_evaluated_again(tmp_path):
    path = tmp_path / PRIOR
    first = priors()
    first.keep_in(path, 0)
    engine = NumberEngine()
    for generation in (0, 2, 4):
        first.evaluate(engine, generation)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"generation": 4, "ta')  # killed in the middle of a line
    again = priors()
    again.keep_in(path, 2)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    calls = engine.calls
    assert [s.task for s in again.evaluate(engine, 2)] == ["a", "b"] and engine.calls == calls
    again.evaluate(engine, 4)
    assert engine.calls == calls + 2 and len(list(read_lines(path))) == 6
    path.write_bytes(whole.replace(b'"greedy"', b'"gree"', 1))
    with pytest.raises(DataError, match="no prior task's score"):
        priors().keep_in(path, 4)


def test_a_task_that_joins_later_is_evaluated_alone(tmp_path):
    first = priors(FEW, "a")
    first.keep_in(tmp_path / PRIOR, 0)
    first.evaluate(NumberEngine(), 0)
    both = priors()
    both.keep_in(tmp_path / PRIOR, 0)
    engine = NumberEngine()
    assert both.due(0, 4) and [s.task for s in both.evaluate(engine, 0)] == ["a", "b"]
    assert engine.calls == 1 and not both.due(0, 4)


def trained(tmp_path, engine=None, goes_on=None, **settings):
    trainer = make_trainer(tmp_path, engine, generations=5, **settings)
    trainer.prior = priors()
    trainer.prior.close = lambda: None
    return trainer


def test_a_run_evaluates_the_unperturbed_model_and_accounts_for_it_apart(tmp_path):
    trainer = trained(tmp_path)
    result = trainer.run()
    records = list(read_lines(tmp_path / "run" / PRIOR))
    assert [r["generation"] for r in records] == [0, 0, 2, 2, 4, 4, 5, 5]
    errors = (trainer.engine.weights - torch.arange(8) / 8).abs()
    held = [int(example.prompt) for example in Targets().held_out(4)]
    assert records[-1]["greedy"]["score"] == pytest.approx(-errors[held].mean().item(), rel=1e-6)
    summary = read_json(tmp_path / "run" / "summary.json")
    assert [part["task"] for part in summary["prior"]] == ["a", "b"]
    assert summary["prior"][0]["greedy"]["final_generation"] == 5
    assert PRIOR_TASKS not in LOOP and result.clock.seconds[PRIOR_TASKS] > 0
    lines = "\n".join(prior_lines(summary["prior"]))
    assert "worst" in lines and "recovery" in lines and "sampled" not in lines


def test_prior_tasks_do_not_change_the_run(tmp_path):
    with_prior = trained(tmp_path / "one")
    with_prior.run()
    without = make_trainer(tmp_path / "two", generations=5)
    without.run()
    assert torch.equal(with_prior.engine.weights, without.engine.weights)
    assert not (tmp_path / "two" / "run" / PRIOR).exists()


def test_a_resumed_run_keeps_its_evaluations(tmp_path):
    import test_resume

    def made(name, engine=None, goes_on=False):
        trainer = test_resume.trainer(tmp_path / name, 5, engine, goes_on)
        trainer.prior = priors()
        return trainer

    made("whole").run()
    # held-out, two prior tasks and a warm-up come first; generation 3 is cut short
    stopped = made("run", NumberEngine(interrupt_at(4 + 2 * 16 + 3 + 5)))
    assert stopped.run().status == "interrupted" and stopped.es.generation == 2
    kept = (tmp_path / "run" / PRIOR).read_bytes()
    again = made("run", goes_on=True)
    again.run()
    assert (tmp_path / "run" / PRIOR).read_bytes().startswith(kept)
    both = [
        [PriorScore.from_record(r) for r in read_lines(tmp_path / n / PRIOR)]
        for n in ("whole", "run")
    ]
    assert [replace(s, seconds=0.0) for s in both[0]] == [replace(s, seconds=0.0) for s in both[1]]


# --- names ----------------------------------------------------------------------------------------


def test_questions_want_the_answer_as_words_of_its_own():
    task = Questions("capitals", evaluation_only=True)
    examples = {example.prompt: example for example in task.held_out(1000)}
    assert len(examples) == 64
    one = examples["What is the capital of Ukraine?"]
    for text, value in (("It is kiev.", 1), ("KYIV", 1), ("Kievan", 0), ("", 0), ("Lima", 0)):
        assert task.score(one, text).value == value
    for name in (path.stem for path in SETS.glob("*.jsonl")):
        kept = make_task(f"questions:{name}")
        trained = {e.id for e in kept.train_batch(0, 0, 200)}
        held = {e.id for e in kept.held_out(1000)}
        assert len(trained) == 48 and len(held) == 16 and not trained & held
        assert all(kept.score(e, e.data["answers"][-1]).solved for e in kept.held_out(1000))


def test_any_task_may_be_a_prior_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    question_file(tmp_path, 6)
    (tmp_path / "rewards.py").write_text("def half(example, completion):\n    return 0.5\n")
    prior = make_prior_task("facts.jsonl@rewards:half", FEW)
    (found,) = prior.evaluate(Echo(lambda *_: "x"), 0)
    prior.close()
    assert (found.task, found.prompts, found.greedy.score) == ("facts", 4, 0.5)
    assert make_prior_task("arithmetic", FEW).describe()["held_out_size"] == 101
    pytest.importorskip("reasoning_gym")
    assert make_prior_task("reasoning_gym:leg_counting", FEW).names == (
        "reasoning_gym:leg_counting",
    )


BAD = {
    "questions:towns": (ConfigError, "there are capitals, opposites, plurals"),
    "no.jsonl": (DataError, "cannot read no.jsonl"),
    "bad.jsonl": (DataError, 'line 1: expected an "answer"'),
    "gsm8k": (ConfigError, "--data"),
    "no.yaml": (ConfigError, "there is no file no.yaml"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_prior_task_is_said(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"prompt": "Say 1.", "answer": 1}')
    error, words = BAD[name]
    with pytest.raises(error, match=words.replace("(", r"\(")):
        make_prior_task(name, FEW)


def test_one_name_twice_is_refused():
    with pytest.raises(ConfigError, match="given twice"):
        priors(FEW, "a", "a")
    with pytest.raises(ConfigError, match="temperature"):
        PriorSettings(temperature=0.0)


# --- lm-evaluation-harness ------------------------------------------------------------------------

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
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
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


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def flags(tmp_path, monkeypatch) -> list[str]:
    pytest.importorskip("transformers")
    import tiny_models

    monkeypatch.chdir(tmp_path)
    tiny_models.llama(num_hidden_layers=1).save_pretrained("model")
    tiny_models.byte_tokenizer().save_pretrained("model")
    question_file(tmp_path, 6)
    return [
        *("train", "--model", "model", "--max-new-tokens", "4", "--population-size", "4"),
        *("--prompts", "2", "--eval-size", "2", "--threads", "1", "--output", "run"),
        *("--prior-tasks", "facts.jsonl,questions:plurals", "--prior-every", "2"),
        *("--prior-size", "3", "--prior-samples", "2"),
    ]


def test_prior_tasks_from_flags_to_pictures_and_over_a_resume(flags, capsys):
    assert run(*flags, "--generations", "2") == 0
    out = capsys.readouterr().out
    assert "prior tasks at generation 2: facts " in out and "    sampled   before " in out
    first = Path("run", PRIOR).read_bytes()
    config = read_json(Path("run/config.json"))
    assert config["prior"]["samples"] == 2 and len(config["prior"]["tasks"]) == 2
    assert Path("run/plots/prior.png").read_bytes().startswith(b"\x89PNG")
    more = "facts.jsonl,questions:plurals,questions:capitals"
    assert run("train", "--resume", "run", "--generations", "4", "--prior-tasks", more) == 0
    lines = Path("run", PRIOR).read_bytes()
    assert lines.startswith(first)
    at = [(r["generation"], r["task"]) for r in read_lines(Path("run", PRIOR))]
    assert len(at) == len(set(at)) == 9 and (0, "questions:capitals") in at
    assert {generation for generation, _ in at} == {0, 2, 4}
    capsys.readouterr()
    assert run("train", "--resume", "run", "--prior-size", "4") == 2
    assert "--prior-size 4 (it has 3)" in capsys.readouterr().err


def test_lambda_auto_holds_the_papers_product(flags, capsys):
    short = [*flags, "--generations", "1", "--prior-size", "1", "--no-plots", "--alpha", "0.02"]
    for kind, weight in (("l2", 0.25), ("l1", 2.5e-4)):
        decay = ["--weight-decay-type", kind, "--weight-decay-lambda", "auto"]
        assert run(*short, *decay, "--output", kind) == 0
        assert f"{kind} decay with lambda {weight:g}" in capsys.readouterr().out
        config = read_json(Path(kind, "config.json"))
        found = config["settings"]["strategy"]["decay"]
        assert found["kind"] == kind and math.isclose(found["weight"], weight)
        assert config["arguments"]["weight_decay_lambda"] == "auto"


def test_bad_flags_are_refused_before_a_model_is_loaded(flags, capsys):
    cases = [
        (["--prior-tasks", "facts.jsonl,,x"], "has an empty name"),
        (["--prior-tasks", "facts.jsonl,facts.jsonl"], "given twice"),
        (["--prior-every", "0"], "whole number of 1 or more"),
        (["--weight-decay-lambda", "some"], "'some' is not a number or 'auto'"),
        (["--weight-decay-lambda", "auto"], "--weight-decay-type"),
    ]
    for arguments, words in cases:
        assert run(*flags, "--model", "nowhere/at all", *arguments) == 2
        err = capsys.readouterr().err
        assert words in err and len(err.splitlines()) == 1
    assert not Path("run").exists()


def test_the_picture_shows_every_task(tmp_path, monkeypatch):
    trainer = trained(tmp_path)
    trainer.progress.console = Console(file=io.StringIO())
    trainer.run()
    panels: list[tuple[str, int]] = []
    monkeypatch.setattr(
        "esfast.plots.picture", lambda path, drawn, made: panels.append((path.name, len(drawn)))
    )
    draw_run(tmp_path / "run")
    assert ("prior.png", 2) in panels
