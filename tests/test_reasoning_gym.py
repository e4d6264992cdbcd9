"""Reasoning-gym: what is taken for the answer, and problems that are the same everywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from esfast.cli import build_parser
from esfast.errors import ConfigError
from esfast.tasks import Score, make_task
from esfast.tasks.gym_scorer import from_json, to_json
from esfast.tasks.harmless import is_formula
from esfast.tasks.reasoning_gym import SCORER, ReasoningGym, extract_answer
from esfast.tasks.reward_pool import Limits, RewardPool
from esfast.train_flags import task_of

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
    pool = RewardPool(f"{SCORER}:score", Limits(timeout=120.0))
    yield pool
    pool.close()


SETS = (
    "sudoku mini_sudoku n_queens futoshiki kakurasu survo tower_of_hanoi rotate_matrix arc_agi "
    "rearc manipulate_matrix pool_matrix binary_matrix modulo_grid knights_knaves emoji_mystery "
    "fraction_simplification sentence_reordering simple_integration countdown leg_counting"
)
EVALUATED = ("string_insertion", "spiral_matrix")


MAKE_ALL = """
import json, sys
from esfast.tasks.gym_rows import marked, rows_of
made = {name: marked(rows_of(name, {"size": 10, "seed": 0})) for name in sys.argv[1:]}
print(json.dumps(made))
"""


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    """Of all data sets from one process, for importing reasoning_gym takes 1.2 s and more."""
    command = [sys.executable, "-c", MAKE_ALL, *SETS.split(), *EVALUATED]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def gym_task(rows, scorer, cache, monkeypatch) -> Callable[[str], ReasoningGym]:
    made = lambda name, config: rows[name]  # noqa: E731
    monkeypatch.setattr("esfast.tasks.reasoning_gym._made_rows", made)

    def make(dataset: str) -> ReasoningGym:
        task = make_task(f"reasoning_gym:{dataset}", size=10)
        task.pool = scorer
        return task

    return make


@pytest.mark.parametrize("dataset", SETS.split())
def test_a_known_answer_scores_alike_with_and_without_tags(gym_task, dataset):
    task = gym_task(dataset)
    for example in task.held_out(2):
        known = example.data["answer"]
        tagged = task.score(example, f"<answer>{known}</answer>").value
        assert task.score(example, known).value == tagged == 1.0
        for words in ("Hm.\n", "The answer is: ", "**Answer:**\n"):
            assert task.score(example, words + known).value == tagged


def test_integrals_over_a_capital_letter_are_scored(gym_task):
    task = gym_task("simple_integration")
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
    running = []
    for seed in "12":
        cache = str(tmp_path / seed)  # cold: each makes its own
        environment = {**os.environ, "PYTHONHASHSEED": seed, "ESFAST_CACHE": cache}
        command = [sys.executable, "-c", code]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    one, other = (process.communicate()[0] for process in running)
    assert one == other and len(one.splitlines()) == 3


def test_problems_that_cannot_be_made_are_said(cache, tmp_path, monkeypatch):
    (tmp_path / "rows.py").write_text("import sys; sys.exit('out of puzzles')")
    monkeypatch.setattr("esfast.tasks.reasoning_gym.ROWS", tmp_path / "rows.py")
    with pytest.raises(ConfigError, match=r"'leg_counting' cannot make .* code 1 .*out of puzzles"):
        make_task("reasoning_gym:leg_counting", size=10)


def test_the_extracted_answer_is_scored_and_problems_are_kept(cache, scorer):
    task = make_task("reasoning_gym:countdown", size=30)
    task.pool = scorer
    example = task.held_out(1)[0]
    right = example.data["answer"]
    assert task.score(example, f"I think the answer is {right}.") == Score(1.0, "Right.", True)
    assert task.score(example, f"<answer>{right}</answer>").solved
    assert task.score(example, "<answer>1 + 1</answer>").value == pytest.approx(0.05)
    (kept,) = (cache / "reasoning_gym").iterdir()
    before = kept.stat().st_mtime_ns
    assert make_task("reasoning_gym:countdown", size=30).held_out(9) == task.held_out(9)
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("dataset", ["countdown", "n_queens", *EVALUATED])
def test_scorers_that_evaluate_never_see_code(gym_task, dataset, tmp_path):
    task = gym_task(dataset)
    example = task.train_batch(0, 0, 1)[0]
    touched = tmp_path / "touched"
    code = f"[open({str(touched)!r}, 'w')]"
    assert task.safe_score(example, f"<answer>{code}</answer>") == Score(
        0.0, "The answer is not in a plain form that can be scored.", False
    )
    assert not touched.exists()
    assert task.safe_score(example, f"<answer>{example.data['answer']}</answer>").value == 1.0


def test_importing_reasoning_gym_is_no_answers_time(tmp_path, monkeypatch):
    """On busy cores it took more than the 10 s that an answer has; the start's limit is 120."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reasoning_gym.py").write_text("open('imported', 'w')")
    pool = RewardPool(f"{SCORER}:score", Limits())
    pool.require_loads()
    pool.close()
    assert Path("imported").exists()


def test_data_sets_and_options_are_named():
    with pytest.raises(ConfigError, match=r"no data set 'nim'.*countdown"):
        make_task("reasoning_gym:nim")
    with pytest.raises(ConfigError, match="min_numbers"):
        make_task("reasoning_gym:countdown", colour="red")
    with pytest.raises(ConfigError, match=r"failure_reward is 1e[+]300"):
        make_task("reasoning_gym:countdown", failure_reward=1e300)


def test_a_gym_scorer_that_hangs_or_crashes_costs_its_answer(
    tmp_path, monkeypatch, request, given_up_on
):
    given_up_on("2")
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path))
    pytest.importorskip("reasoning_gym")
    limits = Limits(memory=1 << 30)
    task = make_task("reasoning_gym:countdown", size=10, limits=limits, failure_reward=-1.0)
    request.addfinalizer(task.close)
    (tmp_path / "broken.py").write_text(
        "import os, time\ndef score(example, answer):\n"
        "    if answer == '1': os._exit(1)\n    if answer == '2': time.sleep(60)\n    return 0.5\n"
    )
    task.pool.close()
    task.pool = RewardPool(f"{tmp_path / 'broken.py'}:score", Limits())
    scores = task.score_all(task.train_batch(0, 0, 4), ["1", "3", "2", "4"])
    assert [(s.value, s.failed) for s in scores] == [(-1.0, True), (0.5, False)] * 2


def test_the_flag_of_the_failure_reward_is_a_gym_tasks_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path))
    flags = ["--task", "reasoning_gym:countdown", "--task-option", "size=10"]
    args = build_parser().parse_args(["train", *flags, "--failure-reward", "-1"])
    with closing(task_of(args)) as task:
        assert task.failure("it hung").value == -1.0


def test_gym_scorers_run_outside_this_process(tmp_path, monkeypatch, request):
    """A scorer that is broken here alone: what counts is the one over there."""
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path))
    gym = pytest.importorskip("reasoning_gym")
    task = make_task("reasoning_gym:countdown", size=10)
    request.addfinalizer(task.close)
    kind = type(gym.create_dataset("countdown", size=1, seed=0))
    monkeypatch.setattr(kind, "score_answer", lambda *_: 1 / 0)
    example = task.train_batch(0, 0, 1)[0]
    assert task.score(example, example.data["answer"]).value == 1.0


def test_problems_travel_unchanged():
    row = {"a": (1, [2, ("x",)]), "b": {0: "zero", (1, 2): {"deep": (None,)}}, "c": True}
    row["d"] = [Fraction(2, 1), Fraction(-1, 3)]  # gsm_symbolic's
    assert from_json(json.loads(json.dumps(to_json(row)))) == row
