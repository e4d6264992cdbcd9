"""Tasks: the same problems everywhere, honest splits, scoring that never evaluates."""

from __future__ import annotations

import json
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esfast.errors import ConfigError, DataError
from esfast.tasks import Example, Score, Task, make_task
from esfast.tasks.countdown import Countdown
from esfast.tasks.draws import Draws
from esfast.tasks.expression import ExpressionError, evaluate
from esfast.tasks.gsm8k import final_number
from esfast.tasks.harmless import is_formula, is_plain
from esfast.tasks.reasoning_gym import extract_answer


def ids(examples: list[Example]) -> set[str]:
    return {example.id for example in examples}


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


# --- the expression parser and countdown ------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("1 + 2 * 3", 7, [1, 2, 3]),
        ("(1 + 2) * 3", 9, [1, 2, 3]),
        ("8 - 3 - 2", 3, [8, 3, 2]),
        ("8 / 4 / 2", 1, [8, 4, 2]),
        ("1/3 + 2/3", 1, [1, 3, 2, 3]),
        ("((5))", 5, [5]),
        ("7/2", Fraction(7, 2), [7, 2]),
    ],
)
def test_expressions_are_worth_what_they_say(text, value, numbers):
    assert evaluate(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "1 +",
            "2 ** 3",
            "7 // 2",
            "-3 + 5",
            "1 2",
            "(1",
            "1)",
            "1.5",
            "__import__('os')",
            "a",
        ),
        *("1/0", "1/(2-2)", "(" * 100 + "1" + ")" * 100, "1" * 201, "9" * 13, "²", "1 = 1", "١"),
    ],
)
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ExpressionError):
        evaluate(text)


tree = st.recursive(
    st.integers(0, 999).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
        lambda t: f"({' '.join(t)})"
    ),
    max_leaves=8,
)


@given(tree)
def test_the_parser_agrees_with_python_on_its_own_grammar(text):
    try:
        value, _ = evaluate(text)
    except ExpressionError as error:
        assert "division by zero" in str(error)
        return
    # The text was made here, from digits and operators; this is the second opinion.
    wrapped = "".join(f"Fraction({part})" if part.isdigit() else part for part in _split(text))
    assert value == _python(wrapped)


def _split(text: str) -> list[str]:
    return text.replace("(", "( ").replace(")", " )").split()


def _python(text: str) -> Fraction:
    import ast
    import operator

    kinds = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
    kinds[ast.Div] = operator.truediv

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return kinds[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Call)
        return Fraction(ast.literal_eval(node.args[0]))

    return value(ast.parse(text, mode="eval").body)


@given(st.text(max_size=60))
def test_no_text_breaks_the_parser(text):
    with suppress(ExpressionError):
        evaluate(text)


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


# --- what may be handed to a scorer that evaluates --------------------------------------------


@pytest.mark.parametrize(
    "text", ["[1, 2]", "[['a']]", "ABC DE", "1 2 3", "_ Q _\nQ _ _", '{"a": 1}']
)
def test_plain_answers_pass(text):
    assert is_plain(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "__import__('os').system('x')",
            "oracle_answer",
            "entry['answer']",
            "9**9**9",
            "f()",
            "a.b",
        ),
        *("[x for x in (1,)]", "f'{a}'", "x" * 5000, "'a' ['b']", "1 .real"),
    ],
)
def test_answers_that_could_do_something_are_refused(text):
    assert not is_plain(text)


@pytest.mark.parametrize("text", ["3*x**2 + 2*x", "(1 + 2) / 3", "sin(x)/2 + C", "-x", "2**0.5"])
def test_formulas_pass(text):
    assert is_formula(text)


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "x.__class__",
        "sin('a')",
        "S('x')",
        "9**(9*9)",
        "(2**100)**100",
        "lambda: 1",
        "[1]",
        *("__import__('os')", "open(1)", "1 if 1 else 2", "9" * 40, "(", "x" + "+x" * 2000),
    ],
)
def test_texts_that_are_no_small_formula_are_refused(text):
    assert not is_formula(text)


# --- reasoning-gym ----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path))
    return tmp_path


def test_reasoning_gym_scores_the_extracted_answer_and_keeps_its_problems(cache):
    task = make_task("reasoning_gym:countdown", size=30)
    example = task.held_out(1)[0]
    right = example.data["answer"]
    assert task.score(example, f"I think the answer is {right}.") == Score(1.0, "Right.", True)
    assert task.score(example, f"<answer>{right}</answer>").solved
    assert task.score(example, "<answer>1 + 1</answer>").value == pytest.approx(0.05)
    (kept,) = (cache / "reasoning_gym").iterdir()
    before = kept.stat().st_mtime_ns
    assert make_task("reasoning_gym:countdown", size=30).held_out(9) == task.held_out(9)
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("dataset", ["countdown", "string_insertion", "spiral_matrix", "n_queens"])
def test_reasoning_gym_scorers_that_evaluate_never_see_code(cache, dataset, tmp_path):
    task = make_task(f"reasoning_gym:{dataset}", size=10)
    example = task.train_batch(0, 0, 1)[0]
    touched = tmp_path / "touched"
    code = f"[open({str(touched)!r}, 'w')]"
    assert task.safe_score(example, f"<answer>{code}</answer>") == Score(
        0.0, "The answer is not in a plain form that can be scored.", False
    )
    assert not touched.exists()
    assert task.safe_score(example, f"<answer>{example.data['answer']}</answer>").value == 1.0


def test_reasoning_gym_names_its_data_sets_and_options(cache):
    with pytest.raises(ConfigError, match=r"no data set 'nim'.*countdown"):
        make_task("reasoning_gym:nim")
    with pytest.raises(ConfigError, match="min_numbers"):
        make_task("reasoning_gym:countdown", colour="red")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>1</answer> and <answer> 2 </answer>", "2"),
        ("First.\nThe answer is 12.", "12"),
        ("Answer: a b", "a b"),
        ("thinking\n42", "42"),
        ("", ""),
    ],
)
def test_answers_are_extracted(completion, answer):
    assert extract_answer(completion) == answer


# --- gsm8k ------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


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


def test_gsm8k_refuses_rows_without_an_answer(tmp_path):
    rows = [*gsm8k_rows(3), {"question": "?", "answer": "42"}]
    with pytest.raises(DataError, match=r"a\.jsonl line 4: expected"):
        make_task("gsm8k", data=write_rows(tmp_path / "a.jsonl", rows))
    with pytest.raises(ConfigError, match="--data"):
        make_task("gsm8k")


# --- a user's own reward ----------------------------------------------------------------------

REWARDS = """
import os, sys, time, math

print("noise on standard output")

def length(example, completion):
    print("more noise")
    return len(completion) / example["longest"]

def told(example, completion):
    return 0.5, "half right"

def modules(example, completion):
    return float("torch" in sys.modules or "esfast" in sys.modules)

def moody(example, completion):
    if completion == "raise": raise KeyError("no")
    if completion == "nan": return math.nan
    if completion == "word": return "1.0"
    if completion == "none": return None
    if completion == "hang": time.sleep(600)
    if completion == "die": os._exit(3)
    if completion == "exit": sys.exit(1)
    return 1

not_a_function = 3
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "base.py").write_text("raise RuntimeError('a file of the package was shadowed')")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"say {n}", "longest": 10} for n in range(10)]
    return write_rows(tmp_path / "prompts.jsonl", rows)


def close_after(task: Task, request: pytest.FixtureRequest) -> Task:
    request.addfinalizer(task.close)
    return task


def test_a_users_function_scores_and_its_output_does_no_harm(rewards, request):
    task = close_after(make_task("custom", reward="my_rewards:length", data=rewards), request)
    examples = task.train_batch(0, 0, 2)
    assert [s.value for s in task.score_all(examples, ["hello", "é" * 20])] == [0.5, 2.0]
    assert not ids(task.held_out(9)) & ids(task.train_batch(0, 0, 8))
    light = close_after(make_task("custom", reward="my_rewards:modules", data=rewards), request)
    assert light.score(examples[0], "").value == 0.0
    by_path = make_task("custom", reward="my_rewards.py:told", data=rewards)
    close_after(by_path, request)
    assert by_path.score(examples[0], "") == Score(0.5, "half right")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reward_that_raises_hangs_or_dies_costs_that_completion_alone(rewards, request, workers):
    task = make_task(
        "custom", reward="my_rewards:moody", data=rewards, timeout=1.0, failure_reward=-1.0,
        workers=workers,
    )  # fmt: skip
    close_after(task, request)
    wrong = ["raise", "nan", "word", "none", "hang", "die", "exit"]
    completions = [text for bad in wrong for text in (bad, "fine")]
    scores = task.score_all(task.train_batch(0, 0, len(completions)), completions)
    assert [score.value for score in scores] == [-1.0, 1.0] * len(wrong)
    assert [score.failed for score in scores] == [True, False] * len(wrong)
    reasons = " / ".join(score.feedback for score in scores[::2])
    for reason in (
        "KeyError",
        "nan",
        "'1.0'",
        "None",
        "no answer within 1 s",
        "code 3",
        "SystemExit",
    ):
        assert reason in reasons


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        ("my_rewards:missing", "missing"),
        ("no_such_module:f", "No module named"),
        ("my_rewards:not_a_function", "not a function"),
        ("my_rewards", "module:function"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused_at_once(rewards, reward, reason):
    with pytest.raises(ConfigError, match=reason):
        make_task("custom", reward=reward, data=rewards)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"prompt": "a"}, "{not json"], "line 2: not JSON"),
        ([{"prompt": "a"}, "", [1]], "line 3: .*no JSON object"),
        ([{"prompt": "a"}, {"text": "b"}], 'line 2: no "prompt"; the row has "text"'),
        ([{"prompt": "a"}, {"prompt": 3}], 'line 2: "prompt" is 3'),
        ([{"prompt": [{"role": "user"}]}], "line 1"),
        ([{"prompt": "a"}, {"prompt": "a", "x": 1}], "one prompt"),
        ([""], "no rows"),
    ],
)
def test_bad_rows_are_named_by_line(rewards, rows, complaint):
    with pytest.raises(DataError, match=complaint):
        make_task("custom", reward="my_rewards:told", data=write_rows(rewards, rows))


def test_prompts_both_trained_and_held_out_are_refused(rewards):
    with pytest.raises(DataError, match="both in training and held out"):
        make_task("custom", reward="my_rewards:told", data=rewards, eval_data=rewards)
    with pytest.raises(DataError, match="cannot read nowhere"):
        make_task("custom", reward="my_rewards:told", data="nowhere.jsonl")


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
