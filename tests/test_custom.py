"""A user's own reward function and prompts: what it costs where it fails, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_tasks import ids, write_rows

from esfast.errors import ConfigError, DataError
from esfast.tasks import Score, Task, make_task

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
def test_a_reward_that_raises_hangs_or_dies_costs_that_completion_alone(
    rewards, request, workers, given_up_on
):
    given_up_on("hang")
    task = make_task(
        "custom", reward="my_rewards:moody", data=rewards, failure_reward=-1.0, workers=workers
    )
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
        "no answer within 0.5 s",
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
    rows = [{"prompt": " say 7\n", "id": "other"}, {"prompt": "say 3", "split": "test"}]
    rows += [{"prompt": [{"role": "user", "content": "say 4"}]}, {"prompt": "say 77"}]
    other = write_rows(rewards.with_name("eval.jsonl"), rows)
    with pytest.raises(DataError, match=r"has 3 prompts both in training and held.*as ' say 7.n';"):
        make_task("custom", reward="my_rewards:told", data=rewards, eval_data=other)
    with pytest.raises(DataError, match="cannot read nowhere"):
        make_task("custom", reward="my_rewards:told", data="nowhere.jsonl")


def test_one_prompt_written_in_two_ways_stays_on_one_side(rewards, request):
    says = [f"say {n}" for n in range(20)]
    rows = [{"prompt": [{"role": "user", "content": said}]} for said in says]
    rows += [{"prompt": [{"content": f"{said} ", "role": "user"}]} for said in says]
    data = write_rows(rewards, rows)
    task = close_after(make_task("custom", reward="my_rewards:told", data=data), request)
    trained, held = (
        {example.prompt[0]["content"].strip() for example in split}
        for split in (task.train_batch(0, 0, 32), task.held_out(99))
    )
    assert len(trained) == 16 and len(held) == 4 and not trained & held
    assert len(task.held_out(99)) == 8 and task.describe()["train_size"] == 32


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"failure_reward": 1e300},
            "failure_reward is 1e[+]300; expected a finite number, 1e[+]30",
        ),
        (
            {"timeout": 1e308},
            "reward timeout is 1e[+]308 s; expected more than 0 and at most 1e[+]06",
        ),
        ({"timeout": 0}, "reward timeout is 0 s"),
        ({"memory": 1e308}, "reward memory is 1e[+]308 GiB; expected 0 .no limit. to 1048576"),
        ({"memory": -1}, "reward memory is -1 GiB"),
        ({"workers": 0}, "reward workers is 0"),
    ],
)
def test_limits_that_cannot_be_are_refused(rewards, changes, said):
    with pytest.raises(ConfigError, match=said):
        make_task("custom", reward="my_rewards:length", data=rewards, **changes)
