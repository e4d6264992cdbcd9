"""`esfast fast-slow` with a tiny model: what it writes, goes on from, reports and refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from report_page import words_of
from test_cli import run
from test_train import legends_over_curves

from esfast.fast_slow.cycles import PROMPTS, read_cycles
from esfast.journal import read_journal
from esfast.plots import draw_run
from esfast.provenance import version
from esfast.run_folder import read_config, read_json, read_lines

pytest.importorskip("gepa")
pytest.importorskip("transformers")

EVIL = '</pre><script>alert("1")</script>'
FUNCTIONS = f"""
import hashlib

def word(example, text):
    digest = hashlib.sha256((example["prompt"] + text).encode("utf-8", "replace")).digest()
    return digest[0] / 255, "longer"

def better(prompt):
    assert "longer" in prompt and "Score 0." in prompt
    mark = hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()[:2]
    return "```\\n" + {EVIL!r} + mark + "\\n```"

def stops(prompt):
    raise OSError("no network here")
"""
FLAGS = [
    *("fast-slow", "--model", "model", "--data", "rows.jsonl", "--reward", "mine:word"),
    *("--max-new-tokens", "4", "--prompts", "4", "--eval-size", "2", "--threads", "1"),
    *("--population-size", "8", "--sigma", "0.05", "--alpha", "0.05", "--instruction", "Say."),
    *("--cycles", "2", "--generations-per-cycle", "2", "--kept-prompts", "3"),
    *("--metric-calls", "60", "--reflection-tokens", "8"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, prompts, functions, and a run that is over: "whole"."""
    import tiny_models

    folder = tmp_path_factory.mktemp("fast-slow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = tiny_models.llama(num_hidden_layers=1, max_position_embeddings=2048)
        tiny_models.save(model.bfloat16(), "model")
        Path("mine.py").write_text(FUNCTIONS)
        rows = [{"prompt": f"Word {n}."} for n in range(20)]
        Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        assert run(*FLAGS, "--reflection", "mine:better", "--output", "whole") == 0
    return folder


def test_a_run_leaves_its_prompts_scores_and_account(there):
    cycles = read_cycles(Path("whole"))
    assert [cycle.generation for cycle in cycles] == [0, 2] and len(cycles[0].prompts) > 1
    assert cycles[0].candidates[0].text == "Say." and any(EVIL in p for p in cycles[0].prompts)
    assert cycles[0].gepa == version("gepa")
    config = read_config(Path("whole"))
    assert config["method"] == "fast-slow" and config["task"]["instruction"] == "Say."
    settings = read_journal(Path("whole")).header.run["settings"]
    assert settings["kept_prompts"] == 3 and settings["strategy"]["shaping"] == "group_centered"
    rows = list(read_lines(Path("whole/metrics.jsonl")))
    assert [row["held_out_best_prompt"] is not None for row in rows] == [False, True, False, True]
    summary = read_json(Path("whole/summary.json"))
    assert summary["fast_slow"]["cycles"] == 2 and summary["cost"]["search"]["prompt"] > 0
    samples = json.loads(Path("whole/samples.json").read_text())
    assert samples[0]["prompt"].startswith("Say.\n\nWord ") and "after" in samples[0]


def test_the_journal_is_enough_for_the_weights(there, capsys):
    assert run("replay", "whole", "--base", "model", "--output", "again", "--verify") == 0
    files = [Path(name, "model.safetensors").read_bytes() for name in ("again", "whole/model")]
    assert files[0] == files[1]


def test_a_run_goes_on_with_more_cycles_to_the_bits_of_the_whole(there, capsys):
    short = [*FLAGS, "--reflection", "mine:better", "--cycles", "1", "--no-plots"]
    assert run(*short, "--output", "part") == 0
    assert run("train", "--resume", "part") == 2
    assert "made by `esfast fast-slow`" in capsys.readouterr().err
    assert run("fast-slow", "--resume", "part", "--metric-calls", "70") == 2
    error = capsys.readouterr().err
    assert "--metric-calls 70 (it has 60)" in error and "--cycles" in error
    assert "--checkpoint-every" not in error, "a flag of another command is not offered"
    assert run("fast-slow", "--resume", "part", "--cycles", "2") == 0
    texts = [[c.prompts for c in read_cycles(Path(name))] for name in ("part", "whole")]
    assert texts[0] == texts[1]
    ends = [Path(name, "model", "model.safetensors").read_bytes() for name in ("part", "whole")]
    assert ends[0] == ends[1]


def test_the_model_reflects_itself_and_repeats(there):
    for name in ("own", "own-again"):
        assert run(*FLAGS, "--cycles", "1", "--no-plots", "--output", name) == 0
    first, again = (read_cycles(Path(name))[0] for name in ("own", "own-again"))
    assert first.candidates == again.candidates and first.failed == again.failed
    assert first.reflections > 0 and first.tokens.generated > 4 * first.metric_calls


def test_a_reflection_that_raises_is_counted_and_shown(there, capsys):
    assert run(*FLAGS, "--cycles", "1", "--no-plots", "--reflection", "mine:stops",
               "--output", "stops") == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "times no proposal: the reflection function raised OSError: no network here" in out
    assert "GEPA" not in out and "Iteration" not in out, "the package prints nothing"


def test_the_pictures_are_there(there):
    pytest.importorskip("matplotlib")
    names = {path.name for path in draw_run(Path("whole"))}
    assert names >= {"held_out.png", "prompts.png", "reward.png", "time.png"}


def test_no_legend_covers_a_curve(there, monkeypatch):
    pytest.importorskip("matplotlib")
    assert legends_over_curves(Path("whole"), monkeypatch) == [False, False, False]


def test_the_report_shows_the_prompts_and_lets_none_in(there, undrawn):
    words = words_of(Path("whole"))
    assert "Prompts that evolved beside the weights" in words and EVIL in words
    html = Path("report.html").read_text()
    assert "<script" not in html and "best prompt of the cycle that begins" in words
    assert "fast-slow ES" in words and "FLOPs of the prompt search" in words


WRONG = {
    "more prompts than pairs": (["--kept-prompts", "5"], "4 antithetic pairs"),
    "a small budget": (["--metric-calls", "13"], "expected 14 or more"),
    "another shaping": (["--shaping", "rank"], "invalid choice: 'rank'"),
    "ray": (["--launcher", "ray"], "without --launcher ray"),
    "no function": (["--reflection", "mine:nobody"], "cannot load the reflection function"),
    "generations": (["--generations", "3"], "--generations 3"),
    "no user's message": (["--data", "system.jsonl"], "its messages are of system"),
    "no room": (["--instruction", "x" * 3000], "Shorten the prompt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_be_mended_is_one_paragraph_and_leaves_no_folder(there, capsys, case):
    flags, message = WRONG[case]
    rows = [{"prompt": [{"role": "system", "content": f"Be {n}."}]} for n in range(9)]
    Path("system.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert run(*FLAGS, *flags, "--output", "wrong") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not Path("wrong").exists()


def test_without_gepa_the_command_says_how_to_get_it(there, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gepa", None)
    assert run(*FLAGS, "--output", "wrong") == 2
    assert "pip install 'esfast[fast-slow]'" in capsys.readouterr().err
    assert not Path("wrong").exists()


def test_torchrun_is_refused(there, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert run(*FLAGS, "--output", "wrong") == 2
    assert "one process" in capsys.readouterr().err


def test_a_damaged_file_of_prompts_is_told(there, capsys):
    shutil.copytree("whole", "damaged")
    (Path("damaged") / PROMPTS).write_text('{"cycle": 0}\n')
    assert run("report", "damaged", "-o", "damaged.html") == 2
    assert "a line that is no cycle's" in capsys.readouterr().err
