"""Tasks: the same problems everywhere, honest splits, scores that say what was right."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from esfast.errors import ConfigError, DataError
from esfast.tasks import Example, Score, Task, make_task
from esfast.tasks.countdown import Countdown
from esfast.tasks.draws import Draws, digest_int
from esfast.tasks.gsm8k import final_number


def ids(examples: list[Example]) -> set[str]:
    return {example.id for example in examples}


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


# --- draws and splits -------------------------------------------------------------------------


def test_draws_are_the_same_on_every_machine():
    draws = Draws("known", 7)
    # SHA-256 of "known", "7" and the draw's number, joined by 0x1f; first 8 bytes, little-endian
    assert [draws.below(1000) for _ in range(4)] == [882, 194, 94, 326]
    assert sorted(Draws("known", 7).shuffled(range(6))) == list(range(6))
    assert Draws("known", 7).shuffled(range(6)) == [0, 1, 3, 2, 5, 4]


@pytest.mark.parametrize("name", ["arithmetic", "countdown"])
def test_held_out_is_never_trained_on_and_batches_repeat(name):
    task = make_task(name)
    held_out = ids(task.held_out(100))
    trained = {
        key for seed in range(3) for g in range(30) for key in ids(task.train_batch(seed, g, 32))
    }
    assert len(held_out) > 80
    assert not held_out & trained
    assert task.train_batch(1, 2, 16) == make_task(name).train_batch(1, 2, 16)
    assert task.train_batch(1, 2, 16) != task.train_batch(1, 3, 16)
    assert task.train_batch(1, 2, 16) != task.train_batch(2, 2, 16)


def test_an_epoch_deals_every_problem_once():
    task = make_task("arithmetic")
    size = task.describe()["train_size"]
    dealt = [example.id for g in range(size // 10 + 1) for example in task.train_batch(3, g, 10)]
    assert len(set(dealt[:size])) == size


def test_an_unknown_task_or_option_names_what_there_is():
    with pytest.raises(
        ConfigError, match=r"no task 'chess'.*arithmetic, countdown.*reasoning_gym:"
    ):
        make_task("chess")
    with pytest.raises(ConfigError, match="min_numbers, max_numbers"):
        make_task("countdown", digits=3)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("countdown", {"min_numbers": "abc"}, "min_numbers='abc'; expected a whole number"),
        ("countdown", {"max_target": None}, "max_target=None; expected a whole number"),
        ("countdown", {"min_numbers": 2.5}, r"min_numbers=2.5; expected a whole number"),
        ("countdown", {"max_value": True}, "max_value=True; expected a whole number"),
        ("countdown", {"max_value": 10**9}, "expected at most 20 times it"),
        ("reasoning_gym:leg_counting", {"size": "abc"}, "size='abc'; expected a whole number"),
        ("reasoning_gym:leg_counting", {"size": -5}, "size=-5; expected 5 problems or more"),
    ],
)
def test_an_option_of_another_kind_is_refused(name, options, said):
    with pytest.raises(ConfigError, match=said):
        make_task(name, **options)


# --- arithmetic -------------------------------------------------------------------------------


def arithmetic_example(problem: str) -> Example:
    task = make_task("arithmetic")
    return next(e for e in [*task.held_out(999), *task.train_batch(0, 0, 202)] if e.id == problem)


def test_arithmetic_rewards_the_bare_equation_and_orders_what_comes_near():
    task, example = make_task("arithmetic"), arithmetic_example("7 * 8")
    answers = [
        "To solve this problem, we need to",
        "The answer is 7 * 5 = 35",
        "7 * 5 = 35",
        "7 * 8 = 54",
        "7 * 8 = 56\n\nThis is",
        "7 * 8 = 56",
    ]
    values = [task.score(example, answer).value for answer in answers]
    assert values[0] == 0.0
    assert values == sorted(values) and len(set(values)) == len(values)
    assert values[-2] <= 0.6 and values[-1] == 1.0
    assert [task.score(example, answer).solved for answer in answers] == [False] * 5 + [True]
    assert task.score(example, " 7 * 8 = 56. ").value == 1.0


def test_the_problem_repeated_does_not_count_as_its_result():
    task, example = make_task("arithmetic"), arithmetic_example("6 - 3")
    assert task.score(example, "What is 6 - 3?").value < task.score(example, "It is 3").value + 0.2
    assert task.score(example, "6 - 3").value == pytest.approx(0.5 * 5 / 9)


# --- countdown -------------------------------------------------------------------------------


def countdown_example() -> Example:
    return Example("x", "", {"numbers": [3, 5, 2], "target": 13})


@pytest.mark.parametrize(
    ("completion", "value", "solved"),
    [
        ("<think>3 * 5 - 2</think>\n<answer>3 * 5 - 2</answer>", 1.1, True),
        ("so it is\n</think> <answer>(3 * 5) - 2</answer>", 1.1, True),
        ("<answer>3 * 5 - 2</answer>", 1.0, True),
        ("<think>x</think><answer>5 + 3</answer>", 0.1, False),
        ("<think>x</think><answer>13</answer>", 0.1, False),
        ("<think>x</think><answer>3 + 5 + 5</answer>", 0.1, False),
        ("<think>x</think><answer>3 ** 5 - 2</answer>", 0.1, False),
        ("<think>x</think><answer>1</answer><answer>3 * 5 - 2</answer>", 1.0, True),
        ("3 * 5 - 2 = 13", 0.0, False),
        ("", 0.0, False),
    ],
)
def test_countdown_pays_for_format_and_answer(completion, value, solved):
    score = Countdown().score(countdown_example(), completion)
    assert score.value == pytest.approx(value)
    assert score.solved is solved and score.feedback


@pytest.mark.parametrize("generation", range(3))
def test_countdown_problems_can_be_solved(generation):
    for example in make_task("countdown").train_batch(0, generation, 10):
        numbers, target = example.data["numbers"], example.data["target"]
        assert target in reachable(tuple(Fraction(n) for n in numbers))
        assert 3 <= len(numbers) <= 4 and str(target) in example.prompt


@pytest.mark.parametrize(
    ("options", "asked", "least"),
    [
        ({"min_numbers": 2, "max_numbers": 2, "max_value": 9, "max_target": 20}, 9, 3),
        ({"min_numbers": 3, "max_numbers": 3, "max_value": 9, "max_target": 20}, 128, 60),
        ({"min_numbers": 2, "max_numbers": 2}, 1000, 600),
    ],
)
def test_countdown_ends_where_the_options_leave_few_problems(options, asked, least):
    task = make_task("countdown", **options)
    held_out = task.held_out(asked)
    assert least <= len(held_out) == len(ids(held_out)) < asked
    assert ids(held_out[:3]) == ids(task.held_out(3))


def test_a_countdown_batch_of_few_problems_deals_them_again():
    task = make_task("countdown", min_numbers=2, max_numbers=2, max_value=9, max_target=20)
    batch = task.train_batch(0, 0, 100)
    there = len(ids(batch))
    assert there == 32 and batch[there : 2 * there] == batch[:there] and len(batch) == 100
    assert not ids(batch) & ids(task.held_out(99))


def test_what_countdown_deals_is_what_it_dealt():
    """Recorded runs are resumed with it."""
    task = make_task("countdown")
    dealt = [e.id for e in (*task.held_out(100), *task.train_batch(5, 1, 100))]
    assert f"{digest_int(*dealt):016x}" == "be2537ce2a482dae"


def test_a_countdown_format_takes_time_that_grows_with_its_length_alone():
    """Ten times as long took a hundred times as long: minutes, for a completion of this length."""
    task, example = make_task("countdown"), countdown_example()
    gap = " \n" * 100_000
    right = f"{gap}x{gap}</think>{gap}<answer>3 * 5 - 2</answer>{gap}"
    assert task.score(example, right).value == pytest.approx(1.1)
    assert task.score(example, f"{gap}<answer>3 * 5 - 2</answer>").value == 1.0
    assert task.score(example, f"{right}x").value == 1.0
    assert task.score(example, "<answer>" * 25_000).value == 0.0


def reachable(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    if len(numbers) == 1:
        return {numbers[0]}
    found: set[Fraction] = set()
    for i in range(len(numbers)):
        for j in range(len(numbers)):
            if i != j:
                rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
                a, b = numbers[i], numbers[j]
                for value in (a + b, a - b, a * b, *([a / b] if b else [])):
                    found |= reachable((*rest, value))
    return found


# --- gsm8k ------------------------------------------------------------------------------------


def gsm8k_rows(count: int) -> list[dict]:
    return [
        {"question": f"{n} and 1?", "answer": f"so it is {n + 1}\n#### {n + 1:,}"}
        for n in range(count)
    ]


def test_gsm8k_reads_the_number_after_the_mark(tmp_path):
    task = make_task("gsm8k", data=write_rows(tmp_path / "a.jsonl", gsm8k_rows(2000)))
    assert not ids(task.held_out(999)) & ids(task.train_batch(0, 0, 1500))
    example = next(e for e in task.train_batch(0, 0, 2000) if e.prompt.startswith("1500 and"))
    assert task.score(example, "1500 + 1 = 1501\n#### 1,501").solved
    assert task.score(example, "That makes $1501.00 in all").solved
    assert task.score(example, "1501 is not it\n#### 12").value == 0.0
    assert task.score(example, "no idea").value == 0.0
    assert final_number("#### 7 apples, not 8") == 7


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### .5", "0.5"),
        ("#### $.50", "0.5"),
        ("#### -.5", "-0.5"),
        ("#### \u22125", "-5"),
        ("#### -$5", "-5"),
        ("#### \u2212$1,200.50", "-1200.5"),
        ("#### $-5", "-5"),
        ("It is 10-5", "5"),
        ("It is 10 - 15 = -5", "-5"),
        ("It is 10\u22125.", "5"),
        ("see 1.2.5", "5"),
        ("see v.5", "5"),
        ("well...5", "5"),
        ("#### 1,501.", "1501"),
    ],
)
def test_gsm8k_reads_signs_and_decimal_points(text, number):
    assert final_number(text) == Decimal(number)


def test_gsm8k_takes_a_question_with_whitespace_around_it_for_the_same(tmp_path):
    rows = gsm8k_rows(20)
    padded = [{**row, "question": f" {row['question']}\n"} for row in rows]
    once = make_task("gsm8k", data=write_rows(tmp_path / "a.jsonl", rows))
    twice = make_task("gsm8k", data=write_rows(tmp_path / "b.jsonl", [*rows, *padded]))
    assert once.describe() == twice.describe()
    prompts = [
        {e.prompt for e in part} for part in (twice.train_batch(0, 0, 18), twice.held_out(9))
    ]
    assert not prompts[0] & prompts[1]


def test_gsm8k_refuses_rows_without_an_answer(tmp_path):
    rows = [*gsm8k_rows(3), {"question": "?", "answer": "42"}]
    with pytest.raises(DataError, match=r"a\.jsonl line 4: expected"):
        make_task("gsm8k", data=write_rows(tmp_path / "a.jsonl", rows))
    with pytest.raises(ConfigError, match="--data"):
        make_task("gsm8k")


# --- any task ---------------------------------------------------------------------------------


def test_a_task_that_misbehaves_costs_the_failure_reward():
    class Broken(Task):
        failure_reward = -2.0

        def train_batch(self, seed, generation, count):
            return []

        def held_out(self, count):
            return []

        def score(self, example, completion):
            if completion == "raise":
                raise RuntimeError("boom")
            return Score(float(completion))

    example = Example("1", "p")
    scores = Broken().score_all([example] * 4, ["raise", "nan", "inf", "3"])
    assert [score.value for score in scores] == [-2.0, -2.0, -2.0, 3.0]
    assert [score.failed for score in scores] == [True, True, True, False]
    assert "boom" in scores[0].feedback
