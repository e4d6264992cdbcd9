"""`esfast grpo`: what it writes, goes on from and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_cli import run

from esfast import ConfigError
from esfast.engines.base import Sampling
from esfast.grpo import CHECKPOINTS, GrpoConfig
from esfast.run_folder import alone, read_json, read_lines

pytest.importorskip("trl")
pytest.importorskip("transformers")

from safetensors import SafetensorError
from transformers import PreTrainedModel


def test_torchrun_is_refused(tmp_path, monkeypatch, capsys):
    """Its processes would make one folder, and TRL would join them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("grpo", "--output", "run") == 2
    assert "one process" in capsys.readouterr().err and not Path("run").exists()


def test_the_command_says_what_was_tuned_and_refuses_anothers_run(
    tmp_path, tiny_model, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    shared = ("--model", str(tiny_model), "--prompts", "2", "--eval-size", "2", "--output", "run")
    grpo = ("grpo", *shared, "--group-size", "2", "--generations", "1", "--threads", "1")
    assert run(*grpo, "--checkpoint-every", "1", "--prior-tasks", "arithmetic",
               "--prior-size", "2", "--prior-samples", "0") == 0  # fmt: skip
    out, err = capfd.readouterr()
    assert "it/s" not in err
    assert "tuned: " in out and "not tuned: " in out and "held-out score" in out
    config = json.loads(Path("run/config.json").read_text())
    assert config["method"] == "grpo" and config["settings"]["group_size"] == 2
    assert config["tuning"].keys() == {"tuned", "not_tuned", "fixed"}
    assert "times the ratio to the old policy" in config["tuning"]["fixed"]["kl"]
    assert config["made"]["packages"]["trl"]
    measured = list(read_lines(Path("run/prior.jsonl")))
    assert [r["generation"] for r in measured] == [0, 1]
    prior = json.loads(Path("run/summary.json").read_text())["cost"]["prior"]
    assert prior["prompt"] == sum(r["read_tokens"] for r in measured) > 0
    assert "measuring cost  held-out" in out and f"prior tasks {prior['prompt']:,} prompt" in out
    assert {p.name for p in Path("run/plots").iterdir()} >= {"reward.png", "held_out.png"}
    assert run("train", "--resume", "run") == 2
    assert "made by `esfast grpo`" in capfd.readouterr().err
    assert run("grpo", "--resume", "run", "--learning-rate", "1") == 2
    assert "--learning-rate 1.0" in capfd.readouterr().err
    with alone(Path("run")):
        assert run("grpo", "--resume", "run", "--generations", "2") == 2
        assert "another process writes the run" in capfd.readouterr().err
    assert run("grpo", "--resume", "run", "--generations", "2") == 0
    assert len(list(read_lines(Path("run/metrics.jsonl")))) == 2
    before = read_json(Path("run/summary.json"))
    assert run("grpo", "--resume", "run") == 0
    again = read_json(Path("run/summary.json"))
    assert again["cost"] == before["cost"] and again["held_out_after"] == before["held_out_after"]
    assert again["held_out_after"]["generation"] == 2 and again["generations"] == 2
    assert len(list(read_lines(Path("run/metrics.jsonl")))) == 2
    assert run("grpo", "--resume", "run", "--generations", "1") == 2
    assert "the run has 2 generations already" in capfd.readouterr().err
    (Path("run") / CHECKPOINTS).rename("elsewhere")
    assert run("grpo", "--resume", "run", "--generations", "3") == 2
    assert "no whole checkpoint" in capfd.readouterr().err


def test_too_little_memory_is_said_before_training(tmp_path, tiny_model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("esfast.resources.available_memory", lambda: None)
    shared = ("--model", str(tiny_model), "--prompts", "2", "--group-size", "2", "--output", "run")

    def little(*_: object) -> None:
        monkeypatch.setattr("esfast.resources.available_memory", lambda: 1000)

    monkeypatch.setattr("esfast.measure.peak_bytes", little)
    assert run("grpo", *shared, "--eval-size", "2", "--no-plots") == 2
    error = capsys.readouterr().err
    assert "gradients and optimiser needs about 1 MB" in error
    assert read_json(Path("run/summary.json"))["status"] == "failed"


def test_without_trl_the_command_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "trl.trainer.grpo_config", None)
    assert run("grpo") == 2
    error = capsys.readouterr().err
    assert "esfast[forgetting]" in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_without_checkpoints_there_is_no_folder_of_them(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ("--prompts", "1", "--group-size", "2", "--eval-size", "1", "--max-new-tokens", "2")
    flags = ("--model", str(tiny_model), "--generations", "1", "--threads", "1", "--no-plots")
    assert run("grpo", *flags, *small, "--output", "run") == 0
    assert not (Path("run") / CHECKPOINTS).exists()


def test_a_group_that_no_memory_holds_is_refused():
    with pytest.raises(ConfigError, match=r"prompts \* group_size is 8 \* 1000000000"):
        GrpoConfig(Sampling(4, temperature=1.0), group_size=10**9)


@pytest.mark.parametrize("command", ["train", "grpo", "fast-slow"])
def test_plots_without_matplotlib_are_refused_before_the_run(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(command, "--model", "no/such/model") == 2
    assert "--no-plots" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.model
def test_smollm2_learns_the_default_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("grpo", "--generations", "3", "--eval-size", "48", "--output", "run") == 0
    summary = read_json(Path("run/summary.json"))
    assert summary["rise"] > 0.2 and summary["rise_in_standard_errors"] > 4


def test_a_disk_that_is_full_at_a_checkpoint_is_said(tmp_path, tiny_model, monkeypatch, capfd):
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    folder = tmp_path / "run"
    shared = ("--model", str(tiny_model), "--prompts", "2", "--eval-size", "2", "--threads", "1")
    grpo = ("grpo", *shared, "--group-size", "2", "--generations", "2", "--output", str(folder))
    assert run(*grpo, "--checkpoint-every", "1") == 2
    err = capfd.readouterr().err
    assert "no checkpoint could be written" in err and "No space left" in err
    assert len(list(read_lines(folder / "metrics.jsonl"))) == 1
