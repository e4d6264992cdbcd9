"""A run that was stopped goes on to the same bits, and refuses what would change them."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from number_engine import NumberEngine, Targets, interrupt_at
from rich.console import Console
from test_cli import REWARD, run

from esfast import (
    AnchoredDecay,
    ConfigError,
    DataError,
    EsfastError,
    StateError,
    StrategyConfig,
    cli,
)
from esfast.engines.base import Sampling
from esfast.journal import read_journal
from esfast.journal_format import MarkRecord, SegmentRecord
from esfast.run_folder import RunFolder, read_config, read_json, read_lines
from esfast.train import TrainConfig, Trainer

SMALLER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
           "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
MADE = {"made": {"esfast": "0"}, "model": "numbers", "task": {"name": "targets"}}


def trainer(path, generations=6, engine=None, goes_on=False, task=None, **settings) -> Trainer:
    strategy = {"sigma": 0.05, "alpha": 0.1, "population_size": 16, "antithetic": True, "seed": 5}
    strategy |= settings.pop("strategy", {})
    config = TrainConfig(
        StrategyConfig(**strategy), Sampling(4), generations, 8, eval_every=2, checksum_every=2,
        **settings,
    )  # fmt: skip
    folder = RunFolder(path, MADE, {} if goes_on else None)
    made = Trainer(
        engine or NumberEngine(), task or Targets(), config, folder, save_model=lambda p: None
    )
    made.progress.console = Console(file=io.StringIO(), width=200)
    return made


def fails_at(call):
    def fail(now):
        if now == call:
            raise RuntimeError("the engine broke")

    return NumberEngine(fail)


# --- the loop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [None, AnchoredDecay("l1", 0.05), AnchoredDecay("l2", 1.0)])
@pytest.mark.parametrize("memory", ["lean", "master"])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, memory, decay):
    settings = {"memory": memory, "strategy": {"decay": decay}}
    whole = trainer(tmp_path / "whole", **settings)
    whole.run()
    stopped = trainer(tmp_path / "run", engine=NumberEngine(interrupt_at(2 + 40)), **settings)
    assert stopped.run().status == "interrupted" and stopped.es.generation == 2
    again = trainer(tmp_path / "run", goes_on=True, **settings)
    result = again.run()
    assert result.status == "finished" and result.generations == 6
    assert torch.equal(again.engine.weights, whole.engine.weights)
    rows = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert [row["generation"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_it_ends_with_the_numbers_of_the_whole_run(tmp_path):
    whole = trainer(tmp_path / "whole").run()
    with pytest.raises(RuntimeError):
        trainer(tmp_path / "run", engine=fails_at(2 + 16 + 3)).run()
    result = trainer(tmp_path / "run", goes_on=True).run()
    assert result.before == whole.before and result.after == whole.after
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["status"] == "finished" and summary["generations"] == 6
    journals = [read_journal(tmp_path / name) for name in ("whole", "run")]
    both = [[r.coefficients.tobytes() for r in j.generations] for j in journals]
    assert both[0] == both[1]
    marks = [r for r in journals[1].records if isinstance(r, MarkRecord)]
    assert [m.generation for m in marks] == [1, 6]


def test_a_finished_run_can_go_further_or_be_saved_again(tmp_path):
    whole = trainer(tmp_path / "whole", 8)
    whole.run()
    trainer(tmp_path / "run", 5).run()
    again = trainer(tmp_path / "run", 5, goes_on=True)
    result = again.run()
    assert (result.status, result.generations) == ("finished", 5)
    assert result.after.generation == 5
    further = trainer(tmp_path / "run", 8, goes_on=True)
    further.run()
    assert torch.equal(further.engine.weights, whole.engine.weights)
    segments = [r for r in read_journal(tmp_path / "run").records if isinstance(r, SegmentRecord)]
    assert [s.generation for s in segments] == [5, 5]


def test_a_run_that_recorded_nothing_starts(tmp_path):
    with pytest.raises(RuntimeError):
        trainer(tmp_path / "run", engine=fails_at(0)).run()
    assert not (tmp_path / "run" / "journal.esj").exists()
    assert trainer(tmp_path / "run", goes_on=True).run().generations == 6


def test_an_update_that_was_only_written_is_done(tmp_path, monkeypatch):
    """Stopped between the journal and the weights: the generation is not evaluated again."""
    whole = trainer(tmp_path / "whole", 3)
    whole.run()
    stopped = trainer(tmp_path / "run", 3)
    update = stopped.rollout.update

    def stop(es, record):
        if record.generation == 1:
            raise RuntimeError("stopped right here")
        return update(es, record)

    monkeypatch.setattr(stopped.rollout, "update", stop)
    with pytest.raises(RuntimeError):
        stopped.run()
    assert stopped.es.generation == 1 and len(read_journal(tmp_path / "run").generations) == 2
    again = trainer(tmp_path / "run", 3, goes_on=True)
    again.run()
    assert torch.equal(again.engine.weights, whole.engine.weights)
    # held-out and warm-up, what was left of generation 2: held-out, one generation, held-out
    assert again.engine.calls == 2 + 1 + 16 + 1
    assert [row["generation"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == [
        1,
        2,
        3,
    ]


def test_failed_rewards_are_counted_over_all_of_the_run(tmp_path):
    whole = trainer(tmp_path / "whole", 4, task=Targets(fail_on=("3",))).run()
    trainer(tmp_path / "run", 2, task=Targets(fail_on=("3",))).run()
    result = trainer(tmp_path / "run", 4, goes_on=True, task=Targets(fail_on=("3",))).run()
    assert result.failed_rewards == whole.failed_rewards == 4 * 16


def test_snapshots_shorten_the_way(tmp_path):
    whole = trainer(tmp_path / "whole", 7)
    whole.run()
    trainer(tmp_path / "run", 5, snapshot_every=2).run()
    assert [p.name for p in (tmp_path / "run" / "snapshots").iterdir()] == [
        "generation-000004.safetensors"
    ]
    again = trainer(tmp_path / "run", 7, goes_on=True, snapshot_every=2)
    applied: list[int] = []
    again._start()
    apply = again.es.apply
    assert again.es.generation == 5
    again.es.apply = lambda record: applied.append(record.generation) or apply(record)
    again._loop()
    assert applied == [5, 6] and torch.equal(again.engine.weights, whole.engine.weights)


def test_a_snapshot_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch):
    import esfast.train

    def full(*_):
        raise EsfastError("no snapshot could be written: No space left on device.")

    monkeypatch.setattr(esfast.train, "save_snapshot", full)
    made = trainer(tmp_path / "run", 3, snapshot_every=1)
    assert made.run().status == "finished"
    assert made.progress.console.file.getvalue().count("its journal is enough") == 3


def test_a_damaged_journal_is_refused_before_anything_is_written(tmp_path):
    trainer(tmp_path / "run").run()
    path = tmp_path / "run" / "journal.esj"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    with pytest.raises(DataError, match=r"record \d+ .*damaged"):
        trainer(tmp_path / "run", goes_on=True)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}


def test_settings_that_are_not_the_journals_are_refused(tmp_path):
    trainer(tmp_path / "run", 2).run()
    with pytest.raises(ConfigError, match="shaping 'z_score'"):
        trainer(tmp_path / "run", 4, goes_on=True, strategy={"shaping": "z_score"}).run()
    assert len(read_journal(tmp_path / "run").generations) == 2


def test_two_processes_do_not_write_one_run(tmp_path):
    trainer(tmp_path / "run").run()
    first = trainer(tmp_path / "run", goes_on=True)
    with pytest.raises(StateError, match="another process"):
        trainer(tmp_path / "run", goes_on=True)
    assert first.run().status == "finished"


def test_damaged_metrics_are_dropped(tmp_path):
    trainer(tmp_path / "run", 4).run()
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{garbage\n" + lines[2] + lines[3][:10])
    trainer(tmp_path / "run", 5, goes_on=True).run()
    assert [row["generation"] for row in read_lines(path)] == [1, 3, 5]


# --- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    pytest.importorskip("transformers")
    import tiny_models

    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_models.save(tiny_models.llama(**SMALLER), folder)
    return folder


@pytest.fixture
def flags(tmp_path, monkeypatch, tiny_model) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARD)
    prompts = [json.dumps({"prompt": f"Say something about {n}."}) for n in range(20)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    return [
        *("train", "--model", str(tiny_model), "--reward", "rewards:vowels"),
        *("--data", "prompts.jsonl", "--dtype", "bfloat16", "--max-new-tokens", "4"),
        *("--sigma", "0.02", "--alpha", "0.02", "--population-size", "4", "--prompts", "2"),
        *("--eval-every", "2", "--eval-size", "2", "--no-plots", "--threads", "1"),
        *("--weight-decay-type", "l2", "--checksum-every", "2"),
    ]


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def test_replay_export_and_apply_give_the_runs_model(flags, tiny_model, capfd):
    assert run(*flags, "--generations", "4", "--output", "run") == 0
    base = ["--base", str(tiny_model), "--output"]
    assert run("replay", "run", *base, "again", "--verify", "--threads", "2") == 0
    assert weights("again") == weights("run/model") != weights(tiny_model)
    out, err = capfd.readouterr()
    assert "4 generations replayed, 2 recorded checksums compared" in out
    assert "it/s" not in err  # no library's bar among the lines
    assert run("export-adapter", "run", "-o", "tuned.esj") == 0
    assert Path("tuned.esj").stat().st_size < 2000
    assert run("apply", "tuned.esj", *base, "applied", "--memory", "shadow") == 0
    assert weights("applied") == weights("run/model")
    assert read_journal("tuned.esj").header.run == {"model": "model"}  # no path of this machine
    assert run("replay", "run", *base, "part", "--until", "2") == 0
    assert weights("part") not in (weights("run/model"), weights(tiny_model))
    assert run("replay", "run/journal.esj", *base, "none", "--until", "0") == 0
    tuned = json.loads(Path("part/esfast.json").read_text())
    assert tuned["generations"] == 2 and tuned["base"] == str(tiny_model)


def test_an_anchor_that_is_not_the_runs_is_told(flags, capfd):
    import tiny_models

    for seed, name in enumerate(("first", "other")):
        tiny_models.save(tiny_models.llama(seed=seed, **SMALLER).bfloat16(), name)
    assert run(*flags, "--generations", "2", "--model", "first", "--output", "run") == 0
    base = ["--base", "first", "--anchor-model"]
    for anchor, told in (("other", True), ("first", False)):
        capfd.readouterr()
        assert run("replay", "run", *base, anchor, "--output", f"again {told}") == 0
        assert ("--anchor-model other is not what" in capfd.readouterr().out) == told
        assert weights(f"again {told}") == weights("run/model")


def test_what_replay_cannot_do_is_said(flags, tiny_model, capfd):
    import tiny_models

    assert run(*flags, "--generations", "1", "--output", "run") == 0
    tiny_models.save(tiny_models.llama(seed=1, **SMALLER), "other")
    free = [*flags, "--weight-decay-type", "none"]
    assert run(*free, "--generations", "1", "--output", "free") == 0
    assert run("export-adapter", "free", "-o", "free.esj") == 0
    Path("text").write_text("no journal")
    base = ["--base", str(tiny_model), "--output", "out"]
    cases = [
        (["replay", "run", *base, "--until", "2"], "--until is 2"),
        (["replay", "nowhere", *base], "cannot read the journal"),
        (["replay", "text", *base], "is no journal"),
        (["replay", "run", "--base", "other", "--output", "out"], "another model"),
        (["replay", "run", "--base", "nowhere/at all", "--output", "out"], "no model folder"),
        (["apply", "text", *base], "is no journal"),
        (["replay", "run", "--base", str(tiny_model), "--output", "other"], "is there already"),
        (
            ["replay", "free", *base, "--anchor-model", "other"],
            "the run of free has no weight decay",
        ),
        (["apply", "free.esj", *base, "--anchor-model", "no/such"], "so nothing pulls to"),
        (["export-adapter", "text", "-o", "out"], "is no journal"),
        (["export-adapter", "run", "-o", "no/folder/x"], "cannot write"),
    ]
    for arguments, expected in cases:
        capfd.readouterr()
        assert run(*arguments) == 2, arguments
        err = capfd.readouterr().err
        assert expected in err and len(err.splitlines()) == 1, err
        assert not Path("out").exists()


def test_resume_from_the_command_line(flags, capfd):
    assert run(*flags, "--generations", "4", "--output", "whole") == 0
    assert run(*flags, "--generations", "2", "--output", "run") == 0
    assert run("train", "--resume", "run", "--generations", "4", "--memory", "shadow") == 0
    assert weights("run/model") == weights("whole/model")
    assert run("train", "--resume", "run", "--generations", "3") == 2
    assert "the run has 4 generations already" in capfd.readouterr().err
    config = read_config(Path("run"))
    assert config["arguments"]["generations"] == 4 and "resumed" not in config["made"]
    (step,) = config["resumed"]
    assert step["changes"] == {"generations": [2, 4], "memory": ["lean", "shadow"]}
    segments = [r for r in read_journal("run").records if isinstance(r, SegmentRecord)]
    assert segments[0].changes == step["changes"] and segments[0].generation == 2
    assert run("train", "--resume", "run", "--snapshot-every", "2") == 0  # nothing left to do
    assert weights("run/model") == weights("whole/model")


def test_what_would_change_the_result_is_refused_by_name(flags, capfd):
    assert run(*flags, "--generations", "1", "--output", "run") == 0
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    cases = {
        "sigma": ["--sigma", "0.03"],
        "alpha": ["--alpha", str(cli.build_parser().parse_args(["train"]).alpha)],  # its default
        "population-size": ["--population-size", "6"],
        "antithetic": ["--no-antithetic"],
        "seed": ["--seed", "1"],
        "weight-decay-lambda": ["--weight-decay-lambda", "1"],
        "dtype": ["--dtype", "float32"],
        "memory": ["--memory", "master"],
        "prompts": ["--prompts", "3"],
        "max-new-tokens": ["--max-new-tokens", "5"],
        "output": ["--output", "elsewhere"],
        "batch-size": ["--batch-size", "3"],
    }
    for name, arguments in cases.items():
        capfd.readouterr()
        assert run("train", "--resume", "run", *arguments) == 2
        err = capfd.readouterr().err
        assert f"cannot go on with --{name} {arguments[-1] if len(arguments) > 1 else ''}" in err
        assert len(err.splitlines()) == 1 and "--memory (lean, shadow); for" in err
    more = Path("prompts.jsonl").read_text() + '\n{"prompt": "one more"}'
    Path("prompts.jsonl").write_text(more)
    assert run("train", "--resume", "run", "--generations", "2") == 2
    assert "its rewards would be others" in capfd.readouterr().err
    assert run("train", "--resume", "nowhere") == 2
    assert "cannot read nowhere/config.json" in capfd.readouterr().err
    assert before == {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_killed_training_process_goes_on_to_the_same_model(flags):
    """Real processes, a real model: SIGKILL at random moments until the run gets through."""
    rng = random.Random(3)
    assert run(*flags, "--generations", "30", "--output", "whole") == 0
    command = [sys.executable, "-m", "esfast"]
    start = [*command, *flags, "--generations", "30", "--output", "run", "--snapshot-every", "5"]
    resume = [*command, "train", "--resume", "run"]
    kills, journal = 0, Path("run/journal.esj")
    while kills < 8:
        arguments = resume if Path("run/config.json").exists() else start
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before = journal.stat().st_size if journal.exists() else 0
        goal = before + rng.randrange(200, 1200)
        while process.poll() is None:
            time.sleep(0.001)
            if journal.exists() and journal.stat().st_size > goal:
                process.send_signal(signal.SIGKILL)
                break
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err.decode()
        if process.returncode == 0:
            break
        kills += 1
    assert kills >= 4
    assert subprocess.run(resume, capture_output=True).returncode == 0
    assert weights("run/model") == weights("whole/model")
