"""Runs that are killed anywhere (by kill_driver.py) end with the bits of a run that never was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def killed(tmp_path: Path, lives: int, seed: int, size: int) -> dict:
    command = [sys.executable, str(Path(__file__).with_name("kill_driver.py")), str(tmp_path)]
    command += [str(lives), str(seed), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    result = json.loads(done.stdout)
    assert result["wrong"] == [] and sum(result["killed"].values()) >= lives
    return result


def test_60_kills_and_every_resume_ends_with_the_same_weights(tmp_path):
    """In writes, syncs, updates and snapshots, and anywhere: journals and weights are those of the
    run that was never killed, to the bit."""
    result = killed(tmp_path, 60, seed=1, size=40)
    assert min(result["killed"].values()) >= 3 and result["runs"] >= 5


@pytest.mark.slow
def test_1000_kills(tmp_path):
    result = killed(tmp_path, 1000, seed=2, size=4000)
    assert min(result["killed"].values()) >= 50
