"""Prior tasks: scores and intervals, and what outlives a stop."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from number_engine import NumberEngine, Targets, interrupt_at, make_trainer
from rich.console import Console
from test_resume import trainer as resumable

from esfast import ConfigError, DataError
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


def test_what_comes_of_scores_is_the_same_after_they_were_read_back():
    """A run that goes on has them from its file, and ends with the numbers of the whole run."""
    scores = [score(g, [1 / 3, g / 7, 0.5 / (1 + g)]) for g in (0, 1, 2)]
    again = [PriorScore.from_record(json.loads(json.dumps(one.record()))) for one in scores]
    assert outcome(scores) == outcome(again)


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


class Kept:
    """A logger that keeps the generations of what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, bool]] = []

    def log(self, generation, numbers) -> None:
        self.told.append((generation, any(name.startswith("prior/") for name in numbers)))

    def close(self) -> None:
        pass


def test_prior_tasks_that_join_later_hide_nothing_that_was_logged(tmp_path):
    resumable(tmp_path / "run", 2).run()
    run = resumable(tmp_path / "run", 4, goes_on=True)
    run.prior, kept = priors(), Kept()
    run.loggers = [kept]
    run.run()
    assert [r["generation"] for r in read_lines(tmp_path / "run" / PRIOR)] == [0, 0, 2, 2, 4, 4]
    assert kept.told == [(3, False), (4, True), (4, False)]  # tensorboard drops from the first on


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


def test_loggers_get_a_curve_a_prior_task(tmp_path):
    trainer, logged = trained(tmp_path), []
    logger = SimpleNamespace(log=lambda at, numbers: logged.append((at, numbers)), close=int)
    trainer.loggers = [logger]
    trainer.run()
    for score in trainer.prior.scores:
        curve = dict.fromkeys([f"prior/{score.task}/greedy"], score.greedy.score)
        assert any(at == score.generation and curve.items() <= n.items() for at, n in logged)


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
    "questions:towns": (ConfigError, "there are capitals, opposites, plurals.*FILE.jsonl itself"),
    "no.jsonl": (DataError, "cannot read no.jsonl"),
    "bad.jsonl": (DataError, 'line 1: expected an "answer"'),
    "gsm8k": (ConfigError, "Name the file itself, FILE.jsonl .* is lm_eval:gsm8k"),
    "custom": (ConfigError, "FILE.jsonl@module:function"),
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
    with pytest.raises(ConfigError, match=r"prior temperature is 1e\+308; expected 1e-06 to 1000"):
        PriorSettings(temperature=1e308)
    with pytest.raises(ConfigError, match="prior samples is -1; expected a whole number, 0 or"):
        PriorSettings(samples=-1)
