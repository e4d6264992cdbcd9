"""A sequence of tasks whose packages, files or folder are not as they should be."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from test_cli import run
from test_continual import STAGES, place

from esfast.prior.evaluation import PRIOR
from esfast.run_folder import alone, read_json

__all__ = ["place"]


@pytest.mark.parametrize(
    ("package", "words"),
    [("transformers", "needs the extra 'train'"), ("matplotlib", "plots need matplotlib")],
)
def test_a_missing_package_is_said_before_there_is_a_folder(
    package, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(Path, "mkdir", lambda self, **_: pytest.fail(f"{self} was made"))
    assert run("continual", "--tasks", "arithmetic", "--output", "out") == 2
    assert words in capsys.readouterr().err


def test_another_process_in_the_sequence_is_refused(there: Path, capsys):
    with alone(Path("whole")):
        assert run("continual", "--resume", "whole") == 2
    assert "another process writes the run" in capsys.readouterr().err


def test_a_stage_killed_while_it_was_drawn_has_its_pictures(there):
    shutil.copytree("whole", "undrawn")
    found = read_json(Path("undrawn/continual.json"))
    found["arguments"]["plots"] = True
    Path("undrawn/continual.json").write_text(json.dumps(found))
    left = [
        Path("undrawn", place, ".reward.png.1.tmp") for place in ("plots", f"{STAGES[0]}/plots")
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    assert run("continual", "--resume", "undrawn") == 0
    for stage in STAGES:
        assert Path("undrawn", stage, "plots", "reward.png").read_bytes().startswith(b"\x89PNG")
    assert not any(path.exists() for path in left)


def test_a_stage_without_its_config_is_not_thrown_away(there: Path, capsys):
    shutil.copytree("whole", "headless")
    Path("headless", STAGES[1], "config.json").unlink()
    Path("headless", STAGES[1], "summary.json").unlink()
    assert run("continual", "--resume", "headless") == 2
    assert "but no config.json" in capsys.readouterr().err
    assert Path("headless", STAGES[1], "journal.esj").exists()


def test_a_damaged_line_of_an_earlier_stages_scores_is_named(there: Path, capsys):
    shutil.copytree("whole", "damaged")
    shutil.rmtree(f"damaged/{STAGES[1]}")
    Path("damaged", STAGES[0], PRIOR).write_text('{"a": 1}\n')
    assert run("continual", "--resume", "damaged") == 2
    assert "no prior task's score" in capsys.readouterr().err
