"""Reasoning-gym: what is taken for the answer, and problems that are the same everywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from esfast.errors import ConfigError
from esfast.tasks import make_task
from esfast.tasks.harmless import is_formula
from esfast.tasks.reasoning_gym import SCORER, ReasoningGym, extract_answer
from esfast.tasks.reward_pool import Limits, RewardPool

pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>1</answer> and <answer> 2 </answer>", "2"),
        ("First.\nThe answer is 12.", "12"),
        ("Answer: a b", "a b"),
        ("thinking\n42", "42"),
        ("", ""),
        ("The answer is: 42", "42"),
        ("The answer is **42**.", "42"),
        ("The answer is **42.**", "42"),
        ("**Answer:** 42", "42"),
        ("**Answer**: `42`", "42"),
        ("**The answer is: 42**", "42"),
        ("### Answer:\n\n$42$", "42"),
        ("The final answer is: $42$.", "42"),
        ("I answer step by step.\n42", "42"),
        ("The answer is 42.\nI hope that this answer helps.", "42"),
        ("My answer:\n```\n42\n```", "42"),
        ("so\n**42**", "42"),
    ],
)
def test_answers_are_extracted(completion, answer):
    assert extract_answer(completion) == answer


GRID = "_ Q\nQ _"


@pytest.mark.parametrize(
    ("completion", "known", "answer"),
    [
        (GRID, "Q _\n_ Q", GRID),
        (f"So it is\n{GRID}\n", "Q _\n_ Q", GRID),
        (f"Answer: {GRID}", "Q _\n_ Q", GRID),
        (f"The answer is:\n\n```text\n{GRID}\n```\nI hope that helps.", "Q _\n_ Q", GRID),
        (f"{GRID}\n<answer>Q _\n_ Q</answer>", "Q _\n_ Q", "Q _\n_ Q"),
        ("The answer is Ann lies.", "Bob lies.", "Ann lies."),
        ("Answer: $1/2$.", "$2/3$", "$1/2$"),
        ('{"a": 1,\n"b": 2}', None, '{"a": 1,\n"b": 2}'),
        ('The answer is:\n{"a": 1,\n"b": 2}', None, '{"a": 1,\n"b": 2}'),
        ("The answer is U R.\nThat was easy.", None, "U R"),
    ],
)
def test_an_answer_has_the_form_of_the_known_one(completion, known, answer):
    assert extract_answer(completion, known) == answer


@pytest.fixture(scope="module")
def scorer() -> Iterator[RewardPool]:
    """One process for all data sets: importing reasoning_gym there takes 5 s."""
    pool = RewardPool(f"{SCORER}:score", Limits(workers=1))
    yield pool
    pool.close()


def gym_task(dataset: str, scorer: RewardPool, **options) -> ReasoningGym:
    task = make_task(f"reasoning_gym:{dataset}", size=10, **options)
    task.pool = scorer
    return task


SETS = (
    "sudoku mini_sudoku n_queens futoshiki kakurasu survo tower_of_hanoi rotate_matrix arc_agi "
    "rearc manipulate_matrix pool_matrix binary_matrix modulo_grid knights_knaves emoji_mystery "
    "fraction_simplification sentence_reordering simple_integration countdown leg_counting"
)


@pytest.mark.parametrize("dataset", SETS.split())
def test_a_known_answer_scores_alike_with_and_without_tags(tmp_path, monkeypatch, scorer, dataset):
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path))
    task = gym_task(dataset, scorer)
    for example in task.held_out(2):
        known = example.data["answer"]
        tagged = task.score(example, f"<answer>{known}</answer>").value
        assert task.score(example, known).value == tagged == 1.0
        for words in ("Hm.\n", "The answer is: ", "**Answer:**\n"):
            assert task.score(example, words + known).value == tagged


def test_integrals_over_a_capital_letter_are_scored(tmp_path, monkeypatch, scorer):
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path))
    task = gym_task("simple_integration", scorer)
    both = [*task.held_out(9), *task.train_batch(0, 0, 8)]
    example = next(e for e in both if re.search(r"\bX\b", e.data["answer"]))
    known = example.data["answer"]
    assert task.score(example, f"<answer>0 + {known}</answer>").solved
    assert is_formula("2*X + C") and not is_formula("2*N") and not is_formula("XX")


def test_problems_do_not_depend_on_the_hashes_of_the_process(tmp_path):
    code = """
from esfast.tasks import make_task
for name in "list_functions isomorphic_strings ransom_note".split():
    task = make_task(f"reasoning_gym:{name}", size=12)
    print(task.describe()["digest"], [e.data["answer"] for e in task.train_batch(0, 0, 9)])
"""
    seen = set()
    for seed in "12":
        cache = str(tmp_path / seed)  # cold: each makes its own
        environment = {**os.environ, "PYTHONHASHSEED": seed, "ESFAST_CACHE": cache}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert len(done.stdout.splitlines()) == 3
        seen.add(done.stdout)
    assert len(seen) == 1


def test_problems_that_cannot_be_made_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path))
    (tmp_path / "rows.py").write_text("import sys; sys.exit('out of puzzles')")
    monkeypatch.setattr("esfast.tasks.reasoning_gym.ROWS", tmp_path / "rows.py")
    with pytest.raises(ConfigError, match=r"'leg_counting' cannot make .* code 1 .*out of puzzles"):
        make_task("reasoning_gym:leg_counting", size=10)
