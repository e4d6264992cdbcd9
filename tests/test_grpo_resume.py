"""A GRPO run that goes on: what it measured no more."""

from __future__ import annotations

import signal

import pytest
import torch
from test_grpo import make_run

from esfast.grpo import CHECKPOINTS
from esfast.grpo_trl import newest_checkpoint
from esfast.run_folder import read_lines


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
