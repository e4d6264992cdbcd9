"""The process of a reward function: how it loads a file, and what it takes for a reward."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from esfast.errors import ConfigError
from esfast.tasks.reward_pool import Limits, RewardFailure, RewardPool
from esfast.tasks.reward_process import load, reply_to

RECORDS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Record:
    text: str

def length(example, completion):
    return len(Record(completion).text)
"""
POOL = """
import multiprocessing

def double(number):
    return 2 * number

def doubled(example, completion):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return sum(pool.map(double, [1, 2]))
"""
SIBLING = """
import json, beside, shared

def sum_of(example, completion):
    return beside.VALUE + shared.VALUE + len(json.dumps(1))
"""
TIMED = """
import signal
begin, times = signal.setitimer, []
signal.setitimer = lambda which, seconds: (times.append(seconds), begin(which, seconds))

def clocks(example, completion):
    return times.count(0.0)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of rewards that is not the current one."""
    (tmp_path / "rewards").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "rewards"


def scored(path: Path, function: str, text: str) -> float:
    pool = RewardPool(f"{path}:{function}", Limits())
    try:
        return pool.call({}, text).value
    finally:
        pool.close()


def test_a_file_of_rewards_may_have_dataclasses_and_pools(folder):
    (folder / "records.py").write_text(RECORDS)
    assert scored(folder / "records.py", "length", "four") == 4.0
    (folder / "pools.py").write_text(POOL)
    assert scored(folder / "pools.py", "doubled", "") == 6.0


def test_a_file_of_rewards_finds_those_beside_it_after_all_others(folder):
    (folder / "main.py").write_text(SIBLING)
    (folder / "beside.py").write_text("VALUE = 10")
    (folder / "json.py").write_text("raise RuntimeError('the standard library was shadowed')")
    (folder / "shared.py").write_text("raise RuntimeError('the current folder was shadowed')")
    (folder.parent / "shared.py").write_text("VALUE = 100")
    assert scored(Path("rewards/main.py"), "sum_of", "") == 111.0


def test_a_file_that_cannot_be_loaded_leaves_no_module(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "broken.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        load(f"{folder / 'broken.py'}:score")
    assert "reward_file" not in sys.modules
    pool = RewardPool(f"{folder / 'broken.py'}:score", Limits())
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        pool.require_loads()


def test_no_clock_runs_while_a_process_waits_for_the_next_completion(folder):
    (folder / "timed.py").write_text(TIMED)
    pool = RewardPool(f"{folder / 'timed.py'}:clocks", Limits())
    assert [pool.call({}, "").value for _ in range(2)] == [0.0, 1.0]
    pool.close()


def test_a_feedback_is_words_or_nothing(folder):
    assert reply_to((0.5, "half")) == {"value": 0.5, "feedback": "half"}
    assert reply_to((0.5, None)) == reply_to(0.5) == {"value": 0.5, "feedback": ""}
    for wrong in ((0.0, 1.0), [0.0, 1.0], (1, True), (1.0, {"why": 1}), (0.5, b"half")):
        assert "expected a number and a feedback in words" in reply_to(wrong)["error"]
    (folder / "two.py").write_text("def two(example, completion):\n    return 0.0, 1.0\n")
    with pytest.raises(RewardFailure, match=r"returned \(0.0, 1.0\).*which a float is not"):
        scored(folder / "two.py", "two", "")
