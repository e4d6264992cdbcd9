"""Fast-slow training: how prompts are split, what a search keeps, and that a run is repeatable."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from instruction_engine import InstructionEngine, make_trainer
from number_engine import SIZE, Targets, shown

from esfast import ConfigError, DataError, shaping
from esfast.cost import Tokens
from esfast.engines.base import Completion, Sampling
from esfast.failures import Failures
from esfast.fast_slow.cycles import Candidate, Cycle, read_cycles
from esfast.fast_slow.instructed import Instructed, instructed
from esfast.fast_slow.reflection import FunctionReflection, ReflectionFailure
from esfast.fast_slow.search import MINIBATCH, Asker, InstructionAdapter, keep
from esfast.fast_slow.split import prompt_number
from esfast.fast_slow.trainer import require_budget, spread
from esfast.journal import read_journal
from esfast.rollout import Rollout
from esfast.run_folder import read_json, read_lines
from esfast.tasks import Example
from esfast.tasks.reward_pool import Limits

pytest.importorskip("gepa")


# --- the instruction ------------------------------------------------------------------------------


def test_an_instruction_stands_before_the_problem():
    assert instructed("2 + 2?", "Add.") == "Add.\n\n2 + 2?"
    assert instructed("2 + 2?", "") == "2 + 2?"
    turns = [{"role": "system", "content": "Be."}, {"role": "user", "content": "2?"},
             {"role": "assistant", "content": "2"}, {"role": "user", "content": "3?"}]  # fmt: skip
    asked = instructed(turns, "Say.")
    assert [turn["content"] for turn in asked] == ["Be.", "Say.\n\n2?", "2", "3?"]
    assert turns[1]["content"] == "2?"
    with pytest.raises(DataError, match="of system, and none is of the user's"):
        instructed(turns[:1], "Say.")


def test_the_task_below_is_the_one_that_scores():
    task = Instructed(Targets(fail_on=("1",)), "Count.")
    (example,) = task.train_batch(0, 0, 1)
    assert example.prompt == "Count.\n\n0" and task.held_out(2)[1].prompt == "Count.\n\n1"
    assert task.score(example, "0").solved and task.score_all([example], ["0"])[0].solved
    assert task.safe_score(task.held_out(2)[1], "0").failed
    assert task.describe()["instruction"] == "Count."


# --- the split ------------------------------------------------------------------------------------


@pytest.mark.parametrize("antithetic", [True, False])
def test_each_problem_has_each_prompt_equally_often_and_pairs_share_it(antithetic):
    for size in range(2, 33, 2):
        groups = size // 2 if antithetic else size
        for kept in range(1, groups + 1):
            table = np.array(
                [[prompt_number(n, antithetic, i, kept) for i in range(9)] for n in range(size)]
            )
            for problem in table.T:
                counts = np.bincount(problem, minlength=kept)
                assert counts.max() - counts.min() <= (2 if antithetic else 1) and counts.min() > 0
            for member in table:
                counts = np.bincount(member, minlength=kept)
                assert counts.max() - counts.min() <= 1
            if antithetic:
                assert (table[::2] == table[1::2]).all()


def watched(monkeypatch, name: str, cls: type) -> list[Any]:
    """What the method returned, call by call."""
    found, method = [], getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda *a: found.append(method(*a)) or found[-1])
    return found


def test_the_rollout_asks_so_and_the_fitness_is_centred_by_problem(tmp_path, monkeypatch):
    earned = watched(monkeypatch, "population", Rollout)
    settings = {"kept_prompts": 3, "metric_calls": 200, "strategy": {"population_size": 12}}

    def some(prompt: str, seed: int) -> Completion:
        return Completion(f"```\nCount.{'!' * (1 + seed % 6)}\n```", 0, True)

    trainer = make_trainer(tmp_path / "run", reflection=some, **settings)
    trainer.run()
    cycles = read_cycles(tmp_path / "run")
    assert all(2 <= len(cycle.prompts) <= 3 for cycle in cycles)
    journal = read_journal(tmp_path / "run")
    for record, one in zip(journal.generations, earned, strict=True):
        assert one.rewards.shape == (12, SIZE)
        fitness = shaping.group_centered(one.rewards)
        assert np.allclose(record.coefficients, 0.1 / 12 * (fitness[::2] - fitness[1::2]))


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_member_answers_each_problem_under_its_prompt_in_the_batchs_order(tmp_path, count):
    trainer = make_trainer(tmp_path / "run", kept_prompts=4)
    trainer.rollout.instructions = tuple(f"Say {k}." for k in range(count))
    batch, draws = trainer.rollout.batch(0), []
    trainer.engine.weights[:] = torch.arange(SIZE) / 8
    for number in range(8):
        del trainer.engine.seen[:]
        found = trainer.rollout.complete(number, batch, Sampling(4, 1.0, seed=2**64 - 1))
        assert [float(c.text) for c in found] == [i / 8 for i in range(SIZE)]
        calls = [(text, s.seed, at) for texts, s in trainer.engine.seen
                 for at, text in enumerate(texts)]  # fmt: skip
        asked = {int(text.rpartition("\n\n")[2]): text for text, _, _ in calls}
        turns = [(number // 2 + i) % count for i in range(SIZE)]
        assert asked == {i: f"Say {k}.\n\n{i}" for i, k in enumerate(turns)}
        draws.append({int(text.rpartition("\n\n")[2]): (seed, at) for text, seed, at in calls})
    assert all(one == draws[0] for one in draws), "all members share a problem's random numbers"
    assert len(set(draws[0].values())) == SIZE, "and no other problem has them"


def test_a_prompt_that_is_worth_more_to_all_members_moves_nothing_alone():
    """With noise that changes no answer, the rewards differ by prompt only; over problems each
    member sees every prompt equally often, so that no member is the better for its prompts."""
    worth = np.array([0.1, 0.9, 0.4, 0.2])
    rewards = np.array([[worth[prompt_number(n, True, i, 4)] for i in range(8)] for n in range(16)])
    assert np.allclose(shaping.group_centered(rewards), 0.0)


# --- the search -----------------------------------------------------------------------------------


def test_the_instruction_gets_better_and_the_account_is_kept(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.run()
    first, second = read_cycles(tmp_path / "run")
    assert first.candidates[0].text == second.candidates[0].text == "Count."
    assert first.prompts[0].startswith("Count.!") and len(first.prompts) == 2
    carried = [c.text for c in second.candidates]
    assert first.prompts[0] in carried, "the best of the cycle before is a candidate again"
    for cycle in (first, second):
        assert cycle.problems == 2 * SIZE and cycle.scored_on == 6
        assert 60 <= cycle.metric_calls < 60 + 6 + 2 * MINIBATCH and cycle.reflections > 1
        assert [c.score for c in cycle.candidates if c.kept and not c.best_on] == []
    summary = read_json(tmp_path / "run" / "summary.json")
    search = summary["cost"]["search"]
    spent = [p for p, s in trainer.engine.seen]
    assert search["prompt"] == first.tokens.prompt + second.tokens.prompt > 0
    total = sum(summary["cost"][part]["prompt"] for part in ("training", "evaluation", "search"))
    warm_up = sum(map(len, trainer.engine.seen[1][0]))
    assert total + warm_up == sum(len(text) for prompts in spent for text in prompts)
    assert summary["seconds"]["prompt search"] == pytest.approx(first.seconds + second.seconds)
    assert summary["fast_slow"]["prompts"] == list(second.prompts)
    assert summary["fast_slow"]["metric_calls"] == first.metric_calls + second.metric_calls


def test_both_scores_are_measured_and_the_prompts_are_worth_something(tmp_path):
    trainer = make_trainer(tmp_path / "run", eval_every=3)
    trainer.run()
    rows = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert [row["held_out"] is not None for row in rows] == [False, True, True, True]
    for row in rows[1:]:
        both = row["held_out"], row["held_out_best_prompt"]
        assert both[0]["generation"] == both[1]["generation"] == row["generation"]
        assert both[1]["score"] > both[0]["score"]
    first, second = read_cycles(tmp_path / "run")
    assert first.held_out["generation"] == 0 and second.held_out["generation"] == 2
    assert "under the first instruction" in shown(trainer)
    assert "prompt search" not in shown(trainer).partition("held-out before")[0]


def test_fewer_prompts_than_asked_for_are_said(tmp_path):
    def same(prompt: str, seed: int) -> Any:
        raise ReflectionFailure("nothing comes to mind")

    trainer = make_trainer(tmp_path / "run", reflection=same)
    trainer.run()
    (first, second) = read_cycles(tmp_path / "run")
    assert first.prompts == second.prompts == ("Count.",)
    assert first.failed == ({"reason": "nothing comes to mind", "count": first.reflections},)
    assert "1 of 1 prompts kept (2 asked for, the Pareto front has no more)" in shown(trainer)
    assert f"{first.reflections} times no proposal: nothing comes to mind" in shown(trainer)


def test_the_best_prompt_of_the_cycle_before_joins_whatever_three_answers_are_worth():
    adapter = InstructionAdapter(Asker(None, Targets(), Sampling(4), Failures()), None,
                                 ["first", "best", "second"], (0,))  # fmt: skip

    def accepted(text: str, after: float) -> bool:
        made = SimpleNamespace(candidate={"instruction": text}, subsample_scores_before=[1.0],
                               subsample_scores_after=[after])  # fmt: skip
        return adapter.should_accept(made, None)

    assert accepted("best", 0.0) and not accepted("second", 0.0)
    assert accepted("second", 1.5) and not accepted("new", 1.0)
    best_is_first = InstructionAdapter(adapter.asker, None, ["first", "first", "second"], (0,))
    adapter = best_is_first
    assert not accepted("second", 0.0), "the best is there already; no other takes its place"


def test_an_instruction_that_is_in_the_pool_is_no_proposal(tmp_path):
    def few(prompt: str, seed: int) -> Completion:
        return Completion(f"```\nCount.{'!' * (1 + seed % 4)}\n```", 0, True)

    make_trainer(tmp_path / "run", reflection=few, metric_calls=150).run()
    for cycle in read_cycles(tmp_path / "run"):
        texts = [candidate.text for candidate in cycle.candidates]
        assert len(texts) == len(set(texts)) > 2
        assert [reason["reason"] for reason in cycle.failed] == [
            "the reflection gave an instruction that is in the pool already"
        ]


def test_what_is_kept_is_the_best_of_the_front():
    pool = [Candidate("a", 0.2, 1), Candidate("b", 0.9, 0), Candidate("c", 0.5, 2),
            Candidate("c", 0.5, 1), Candidate("d", 0.2, 1)]  # fmt: skip
    assert [c.kept for c in keep(pool, 2)] == [True, False, True, False, False]
    assert [c.kept for c in keep(pool, 9)] == [True, False, True, False, True]


def test_problems_are_spread_over_the_cycle():
    problems = [Example(str(n), str(n)) for n in range(10)]
    assert [e.id for e in spread(problems, 4)] == ["0", "2", "5", "7"]
    assert spread(problems, None) == spread(problems, 99) == problems


def test_an_error_of_the_engine_ends_the_run_in_a_reflection_too(tmp_path):
    class Breaks(InstructionEngine):
        def generate(self, prompts, sampling):
            if "Your task" in prompts[0]:
                raise RuntimeError("the engine broke")
            return super().generate(prompts, sampling)

    with pytest.raises(RuntimeError, match="the engine broke"):
        make_trainer(tmp_path / "run", engine=Breaks()).run()


def test_scoring_that_raises_costs_its_answer(tmp_path):
    trainer = make_trainer(tmp_path / "run", task=Targets(fail_on=("3",)))
    trainer.run()
    asked = [text for prompts, _ in trainer.engine.seen for text in prompts]
    (reason,) = trainer.failures.record()
    assert reason["count"] == sum(text.endswith("\n\n3") for text in asked) - 1  # the warm-up's


class Narrow(InstructionEngine):
    """Has a context of so many characters."""

    context = 14

    def require_room(self, prompts, max_new_tokens, kind="prompt"):
        longest = max(map(len, prompts))
        if longest + max_new_tokens > self.context:
            raise ConfigError(f"{kind} has {longest} tokens")
        return self.context - longest - max_new_tokens


def test_an_instruction_that_does_not_fit_is_no_candidate(tmp_path):
    trainer = make_trainer(tmp_path / "run", engine=Narrow())
    trainer.run()
    for cycle in read_cycles(tmp_path / "run"):
        assert {c.text for c in cycle.candidates} <= {"Count.", "Count.!"}
        (reason,) = cycle.failed
        assert "does not fit the model's context" in reason["reason"] and reason["count"] > 1


def test_a_reflection_prompt_that_does_not_fit_is_told_once(tmp_path):
    class Short(InstructionEngine):
        def generate(self, prompts, sampling):
            if "Your task" in prompts[0]:
                raise ConfigError(f"prompt 0 has {len(prompts[0])} tokens")
            return super().generate(prompts, sampling)

    trainer = make_trainer(tmp_path / "run", engine=Short())
    trainer.run()
    (reason,) = read_cycles(tmp_path / "run")[0].failed
    assert "256 tokens of an answer do not fit" in reason["reason"] and reason["count"] > 1


class Lengthening(Targets):
    """The second cycle's problems have four characters more."""

    def train_batch(self, seed, generation, count):
        batch = super().train_batch(seed, generation, count)
        return [replace(e, prompt=e.prompt.rjust(1 + 4 * (generation > 1))) for e in batch]


def test_a_prompt_of_the_cycle_before_that_no_longer_fits_is_left(tmp_path):
    engine = Narrow()
    engine.context = 18
    trainer = make_trainer(tmp_path / "run", engine=engine, task=Lengthening())
    assert trainer.run().status == "finished"
    first, second = read_cycles(tmp_path / "run")
    assert any(len(prompt) > 7 for prompt in first.prompts)
    assert max(len(candidate.text) for candidate in second.candidates) <= 7


FUNCTIONS = """
import time
def good(prompt): return "```\\nBe exact.\\n```" if "Score" in prompt else "?"
def raises(prompt): raise ValueError("no idea")
def hangs(prompt): time.sleep(60)
def none(prompt): return None
def long(prompt): return "x" * 5001
def empty(prompt): return "``````"
def half(prompt): return "\\ud83d"
"""
SAID = {"raises": "the reflection function raised ValueError: no idea", "hangs": "no answer within",
        "none": "the reflection function returned None; expected a text of 1 to 5000",
        "long": "of 5001 characters; expected"}  # fmt: skip


@pytest.fixture
def functions(tmp_path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return str(path)


@pytest.mark.parametrize("name", SAID)
def test_a_reflection_that_fails_costs_its_proposal(functions, name):
    reflection = FunctionReflection(f"{functions}:{name}", Limits(0.5 if name == "hangs" else 60))
    for _ in range(2):  # the second finds a process again
        with pytest.raises(ReflectionFailure, match=SAID[name]):
            reflection("p", 0)
    reflection.close()


@pytest.mark.parametrize("name", ["good", "raises", "empty", "half"])
def test_a_run_goes_on_whatever_its_reflection_does(tmp_path, functions, name):
    reflection = FunctionReflection(f"{functions}:{name}", Limits(60.0))
    trainer = make_trainer(tmp_path / "run", reflection=reflection)
    assert trainer.run().status == "finished"
    reflection.close()
    first, _ = read_cycles(tmp_path / "run")
    counted = sum(reason["count"] for reason in first.failed)
    assert counted == (0 if name == "good" else first.reflections) and first.reflections


def test_a_reflection_that_cannot_be_loaded_is_refused(functions):
    with pytest.raises(ConfigError, match="cannot load the reflection function"):
        FunctionReflection(f"{functions}:nowhere", Limits(10.0))


# --- what is refused ------------------------------------------------------------------------------


WRONG = {
    "more prompts than pairs": ({"kept_prompts": 5}, "the population has 4 antithetic pairs"),
    "more prompts than members": (
        {"kept_prompts": 9, "strategy": {"antithetic": False}},
        "the population has 8 members",
    ),
    "another shaping": ({"strategy": {"shaping": "rank"}}, "one group"),
    "half a cycle": ({"generations": 3}, "no whole number of cycles"),
    "no calls": ({"metric_calls": 0}, "metric_calls is 0"),
    "no problems": ({"pareto_size": 0}, "pareto_size is 0"),
    "a huge cycle": (
        {"generations": 10**9, "generations_per_cycle": 10**9},
        r"generations_per_cycle \* prompts is 1000000000 \* 8; expected 1000000 at most",
    ),
    "half a character": ({"instruction": "\ud83d"}, "half a character"),
    "a cold reflection": ({"reflection_temperature": 1e-9}, "temperature is 1e-09"),
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_cannot_be_are_refused(tmp_path, case):
    settings, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path / "run", **settings)


def test_a_budget_without_a_proposal_is_refused(tmp_path):
    trainer = make_trainer(tmp_path / "run", metric_calls=12)
    require_budget(trainer.task, trainer.config)
    short = make_trainer(tmp_path / "short", metric_calls=12, pareto_size=7)
    with pytest.raises(ConfigError, match=r"expected 13 or more.*7 problems of a cycle's 16"):
        require_budget(short.task, short.config)


def test_every_cycles_budget_is_looked_at(tmp_path, monkeypatch):
    found = "esfast.fast_slow.trainer.problems_of"
    monkeypatch.setattr(found, lambda task, config, cycle: [None] * (8 + cycle))
    made = make_trainer(tmp_path / "run", metric_calls=14, pareto_size=None)
    with pytest.raises(ConfigError, match=r"expected 15 or more.*9 problems of a cycle's 9"):
        require_budget(made.task, made.config)


def test_a_cycle_is_written_and_read_back():
    pool = Candidate("a", 0.5, 1, None, True), Candidate("b", 0.7, 2, 0, True)
    failed = ({"reason": "r", "count": 1},)
    cycle = Cycle(0, 0, 4, 4, 9, 1, failed, Tokens(3, 4), 0.5, pool)
    assert cycle.prompts == ("b", "a")
    assert Cycle.from_record(json.loads(json.dumps(cycle.record()))) == cycle
