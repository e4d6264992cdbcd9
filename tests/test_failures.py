"""Why scoring failed is told when it is first met, and counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from number_engine import Targets, make_trainer, shown
from test_cli import run as run_command

from esfast.failures import KEPT, OTHERS, TOLD, Failures
from esfast.report import result_lines
from esfast.run_folder import read_json
from esfast.tasks.base import Score


def test_reasons_are_told_once_and_counted() -> None:
    told: list[str] = []
    failures = Failures(told.append)
    failures.add([Score(0.0, "fine"), Score(0.0, "it  broke\n here", failed=True)] * 3, "an answer")
    assert told == ["an answer could not be scored and got the failure reward: it broke here"]
    assert failures.record() == [{"reason": "it broke here", "count": 3}]
    failures.add([Score(0.0, f"reason {n}", failed=True) for n in range(2 * KEPT)], "an answer")
    assert len(told) == TOLD
    found = {entry["reason"]: entry["count"] for entry in failures.record()}
    assert len(found) == KEPT + 1 and found[OTHERS] == KEPT + 1


def test_what_a_model_wrote_does_not_reach_the_terminal_as_it_is() -> None:
    """An exception of a reward function often quotes the answer."""
    told: list[str] = []
    failures = Failures(told.append)
    failures.add([Score(0.0, "bad \x1b[2Janswer\x07 \u202eü", failed=True)], "an answer")
    assert told[0].endswith(r"failure reward: bad \x1b[2Janswer\x07 \u202eü")


def test_a_run_says_why(tmp_path: Path) -> None:
    run = make_trainer(tmp_path, task=Targets(fail_on=("3",)), generations=1)
    result = run.run()
    reason = "scoring raised ValueError: no score today"
    assert shown(run).count(reason) == 1 and "a held-out answer could not be" in shown(run)
    said = "\n".join(result_lines(result))
    assert "not scored      1 of the held-out answers before" in said
    assert f"18 times: {reason}" in said
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["failed_rewards"] == 16  # of the members; 2 more of the held-out prompts
    assert summary["failure_reasons"] == [{"reason": reason, "count": 18}]


@pytest.mark.parametrize(
    ("reward", "code"), [("1 / 0", 2), ("1.0 if '0' in str(prompt) else 1 / 0", 0)]
)
def test_a_run_whose_rewards_all_failed_is_no_success(
    reward: str, code: int, tmp_path: Path, tiny_model: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(f"def reward(prompt, completion):\n    return {reward}\n")
    Path("data.jsonl").write_text('{"prompt": "Say 0"}\n{"prompt": "Say 1"}\n')
    Path("held.jsonl").write_text('{"prompt": "Say 2"}\n')
    flags = ("--data", "data.jsonl", "--eval-data", "held.jsonl", "--prompts", "2", "--no-plots")
    small = ("--max-new-tokens", "2", "--population-size", "2", "--generations", "2")
    own = ("--model", str(tiny_model), "--reward", "mine.py:reward", "--threads", "1")
    assert run_command("train", *own, *flags, *small, "--output", "run") == code
    error = capsys.readouterr().err
    assert ("all 8 rewards failed, so nothing was learnt" in error) == (code == 2)
    assert read_json(Path("run/summary.json"))["status"] == "finished"
