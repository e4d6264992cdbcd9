"""Prior tasks from the command line: flags, files, pictures, and lambda after the paper."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from test_cli import run
from test_prior_tasks import question_file

from esfast.prior.evaluation import PRIOR
from esfast.run_folder import read_json, read_lines


@pytest.fixture
def flags(tmp_path, monkeypatch) -> list[str]:
    pytest.importorskip("transformers")
    import tiny_models

    monkeypatch.chdir(tmp_path)
    tiny_models.save(tiny_models.llama(num_hidden_layers=1), "model")
    question_file(tmp_path, 6)
    return [
        *("train", "--model", "model", "--max-new-tokens", "4", "--population-size", "4"),
        *("--prompts", "2", "--eval-size", "2", "--threads", "1", "--output", "run"),
        *("--prior-tasks", "facts.jsonl,questions:plurals", "--prior-every", "2"),
        *("--prior-size", "3", "--prior-samples", "2"),
    ]


def test_prior_tasks_from_flags_to_pictures_and_over_a_resume(flags, capsys):
    assert run(*flags, "--generations", "2") == 0
    out = capsys.readouterr().out
    assert "prior tasks at generation 2: facts " in out and "    sampled   before " in out
    first = Path("run", PRIOR).read_bytes()
    config = read_json(Path("run/config.json"))
    assert config["prior"]["samples"] == 2 and len(config["prior"]["tasks"]) == 2
    assert Path("run/plots/prior.png").read_bytes().startswith(b"\x89PNG")
    more = "facts.jsonl,questions:plurals,questions:capitals"
    assert run("train", "--resume", "run", "--generations", "4", "--prior-tasks", more) == 0
    lines = Path("run", PRIOR).read_bytes()
    assert lines.startswith(first)
    at = [(r["generation"], r["task"]) for r in read_lines(Path("run", PRIOR))]
    assert len(at) == len(set(at)) == 9 and (0, "questions:capitals") in at
    assert {generation for generation, _ in at} == {0, 2, 4}
    capsys.readouterr()
    assert run("train", "--resume", "run", "--prior-size", "4") == 2
    assert "--prior-size 4 (it has 3)" in capsys.readouterr().err


def test_lambda_auto_holds_the_papers_strength(flags, capsys):
    short = [*flags, "--generations", "1", "--prior-size", "1", "--no-plots", "--alpha", "0.02"]
    short += ["--population-size", "4"]
    for kind, weight in (("l2", 0.25), ("l1", 0.01 * math.sqrt(30 / 4))):
        decay = ["--weight-decay-type", kind, "--weight-decay-lambda", "auto"]
        assert run(*short, *decay, "--output", kind) == 0
        assert f"{kind} decay with lambda {weight:g}" in capsys.readouterr().out
        config = read_json(Path(kind, "config.json"))
        found = config["settings"]["strategy"]["decay"]
        assert found["kind"] == kind and math.isclose(found["weight"], weight)
        assert config["arguments"]["weight_decay_lambda"] == "auto"


def test_bad_flags_are_refused_before_a_model_is_loaded(flags, capsys):
    cases = [
        (["--prior-tasks", "facts.jsonl,,x"], "has an empty name"),
        (["--prior-tasks", "facts.jsonl,facts.jsonl"], "given twice"),
        (["--prior-path", "."], "--prior-tasks names none of those"),
        (["--prior-every", "0"], "whole number of 1 or more"),
        (["--weight-decay-lambda", "some"], "'some' is not a number or 'auto'"),
        (["--weight-decay-lambda", "auto"], "--weight-decay-type"),
    ]
    for arguments, words in cases:
        assert run(*flags, "--model", "nowhere/at all", *arguments) == 2
        err = capsys.readouterr().err
        assert words in err and len(err.splitlines()) == 1
    assert not Path("run").exists()
