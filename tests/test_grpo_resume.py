"""A GRPO run that goes on: what it measured no more, and what it has to begin anew."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_cli import run
from test_grpo import make_run

from esfast.grpo import CHECKPOINTS
from esfast.grpo_trl import newest_checkpoint
from esfast.run_folder import read_json, read_lines


@pytest.mark.parametrize("stopped", [2, 3])
def test_what_ctrl_c_left_unmeasured_is_made_up_for(stopped, tmp_path, monkeypatch):
    settings = {"generations": 3, "eval_every": 1, "checkpoint_every": 1}
    make_run(tmp_path / "whole", **settings).run()
    step = torch.optim.AdamW.step
    steps: list[int] = []

    def impatient(self, *arguments, **named):
        steps.append(1)
        if len(steps) == stopped:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", impatient)
    result = make_run(tmp_path / "run", **settings).run()
    assert (result.status, result.generations) == ("interrupted", stopped)
    rows = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert len(rows) == stopped and rows[-1]["held_out"] is None
    done, newest = newest_checkpoint(tmp_path / "run" / CHECKPOINTS)
    assert done == stopped
    assert make_run(tmp_path / "run", done=done, **settings).run(newest).status == "finished"
    rows = [list(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("run", "whole")]
    for there, expected in zip(*rows, strict=True):
        assert there["held_out"] == expected["held_out"] and there["cost"] == expected["cost"]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    tmp_path, tiny_model, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    small = ("--prompts", "1", "--group-size", "2", "--eval-size", "1", "--max-new-tokens", "2")
    flags = ("--model", str(tiny_model), "--generations", "3", "--threads", "1", "--no-plots")
    assert run("grpo", *flags, *small, "--output", "run", "--checkpoint-every", "2") == 0
    whole = [row["reward_mean"] for row in read_lines(Path("run/metrics.jsonl"))]
    shutil.rmtree(Path("run") / CHECKPOINTS)
    assert run("grpo", "--resume", "run") == 2  # its model is there
    shutil.rmtree("run/model")
    assert run("grpo", "--resume", "run") == 2  # so was a checkpoint, by its metrics
    assert capfd.readouterr().err.count("holds no whole checkpoint") == 2
    lines = Path("run/metrics.jsonl").read_bytes().splitlines(keepends=True)
    Path("run/metrics.jsonl").write_bytes(b"".join(lines[:2]) + b'{"torn')
    assert run("grpo", "--resume", "run") == 0
    assert "stopped before its first checkpoint" in capfd.readouterr().out
    again = [row["reward_mean"] for row in read_lines(Path("run/metrics.jsonl"))]
    assert again == whole and read_json(Path("run/summary.json"))["generations"] == 3
