"""The loop on an engine of eight numbers: what is written, what is restored, what is reported."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from number_engine import SIZE, NumberEngine, Targets, interrupt_at, make_trainer, shown
from rich.console import Console

from esfast import (
    AnchoredDecay,
    ConfigError,
    EsfastError,
    Member,
    ParameterTable,
    StrategyConfig,
    Weights,
    generation_seed,
    member_seed,
)
from esfast.engines.base import Sampling
from esfast.held_out import HeldOut
from esfast.journal import read_journal
from esfast.loggers import TensorBoardLogger, make_loggers, require_packages
from esfast.plots import draw_run
from esfast.progress import GenerationReport, RunProgress
from esfast.report import _shown, print_result
from esfast.rollout import strategy_over
from esfast.run_folder import RunFolder, append_line, read_lines
from esfast.tasks import Score
from esfast.train import TrainConfig


def test_a_run_learns_and_writes_down_what_happened(tmp_path):
    saved: list[Path] = []
    trainer = make_trainer(tmp_path, generations=30, saved=saved)
    result = trainer.run()
    run = tmp_path / "run"
    assert result.status == "finished" and saved == [run / "model"]
    assert result.after.mean > result.before.mean / 3  # the error falls by two thirds
    assert result.rise[1] > 3
    rows = list(read_lines(run / "metrics.jsonl"))
    assert [row["generation"] for row in rows] == list(range(1, 31))
    assert [row["generation"] for row in rows if row["held_out"]] == list(range(2, 31, 2))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["generations"] == 30
    assert summary["held_out_after"]["score"] == result.after.mean
    assert summary["rise_in_standard_errors"] == result.rise[1]
    samples = json.loads((run / "samples.json").read_text())
    assert len(samples) == 4 and samples[1]["before"]["answer"] == "0"
    assert samples[1]["after"]["answer"] == result.after.completions[1] != "0"


def test_generations_hold_all_that_the_update_needs(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run()
    replayed = torch.zeros(SIZE)
    weights = Weights(ParameterTable.from_tensors({"weights": replayed}))
    journal = read_journal(tmp_path / "run")
    for number, record in enumerate(journal.generations):
        members = [Member(member_seed(5, number, k), 1, "gaussian") for k in range(8)]
        both = trainer.es.strategy.coefficients(record.rewards)
        assert record.coefficients.tolist() == (both[::2] - both[1::2]).astype("f4").tolist()
        weights.update(members, record.coefficients, seed=generation_seed(5, number))
    assert len(journal.generations) == 6
    assert journal.records[-1].checksum == weights.checksum()
    assert weights.checksum() == trainer.es.weights.checksum()
    assert torch.equal(replayed, trainer.engine.weights) and replayed.any()


def test_every_member_answers_the_generations_prompts(tmp_path):
    trainer = make_trainer(tmp_path, generations=2, eval_every=5, prompts=3)
    trainer.run()
    # held-out, warm-up, 16 members, 16 members, held-out at the end
    assert len(trainer.engine.seen) == 2 + 32 + 1
    assert all(prompts == ["0", "1", "2"] for prompts in trainer.engine.seen[1:-1])


@pytest.mark.parametrize("memory", ["lean", "shadow"])
@pytest.mark.parametrize("decay", [None, AnchoredDecay("l2", 1.0)])
def test_memory_modes_and_decay_run(tmp_path, memory, decay):
    strategy = {"decay": decay, "shaping": "z_score"}
    result = make_trainer(tmp_path, memory=memory, strategy=strategy).run()
    assert result.after.mean > result.before.mean
    assert result.memory.inference_bytes > 1e6 and result.memory.ratio >= 1.0


def test_the_runs_peak_includes_that_of_generating(tmp_path, monkeypatch):
    """The kernel's own peak went back by 24 kB of 2 GB: it counts pages in batches a core."""
    falling = iter([2_022_825_984, 2_022_801_408])
    monkeypatch.setattr("esfast.measure.peak_bytes", lambda: next(falling))
    result = make_trainer(tmp_path).run()
    assert result.memory.peak_bytes == result.memory.inference_bytes == 2_022_825_984


def test_group_centred_shaping_gets_the_matrix(tmp_path):
    trainer = make_trainer(tmp_path, strategy={"shaping": "group_centered"})
    result = trainer.run()
    record = read_journal(tmp_path / "run").generations[0]
    assert record.rewards.shape == (16, SIZE)
    assert result.after.mean > result.before.mean


def test_held_out_answers_are_greedy_and_every_generation_draws_anew(tmp_path):
    engine, seen = NumberEngine(), []
    generate, sampling = engine.generate, Sampling(4, temperature=1.0, seed=3)
    engine.generate = lambda asked, how: seen.append(how) or generate(asked, how)
    make_trainer(tmp_path, engine, generations=2, sampling=sampling).run()
    greedy = replace(sampling, temperature=0.0)
    second = replace(sampling, seed=4)  # after one generation of 16 members, and the warm-up
    assert seen == [greedy, *[sampling] * 17, *[second] * 16, greedy]


def test_decay_pulls_to_the_model_that_is_named():
    engine, given, named = NumberEngine(), [], Path("model")
    engine.live_weights = lambda memory, anchor, threads: given.append(anchor) or engine._table
    for decay, anchor in ((None, named), (AnchoredDecay("l2", 1.0), named)):
        strategy_over(engine, TrainConfig(StrategyConfig(decay=decay), Sampling(4)), anchor)
    assert given == [False, named]


def weights_after(tmp_path, generations: int) -> torch.Tensor:
    trainer = make_trainer(tmp_path / f"first-{generations}", generations=generations)
    trainer.run()
    return trainer.engine.weights.clone()


@pytest.mark.parametrize(("call", "whole"), [(2 + 16 + 7, 1), (2 + 3, 0), (2 + 32 + 1 + 15, 2)])
def test_ctrl_c_leaves_the_last_whole_generation(tmp_path, call, whole):
    saved: list[Path] = []
    trainer = make_trainer(tmp_path, NumberEngine(interrupt_at(call)), saved=saved)
    result = trainer.run()
    assert (result.status, result.generations) == ("interrupted", whole)
    assert result.before is not None and (result.after is not None) == (whole >= 2)
    print_result(trainer.progress.console, result, tmp_path / "run")
    assert ("not measured since" in shown(trainer)) == (whole < 2)
    if whole:
        assert torch.equal(trainer.engine.weights, weights_after(tmp_path, whole))
    else:
        assert not trainer.engine.weights.any()
    assert bool(saved) == bool(whole)
    assert len(read_journal(tmp_path / "run").generations) == whole
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"


def test_ctrl_c_before_anything_was_measured_still_ends_in_order(tmp_path):
    result = make_trainer(tmp_path, NumberEngine(interrupt_at(0))).run()
    assert result.status == "interrupted" and result.before is None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["generations"] == 0 and summary["rise"] is None


def test_an_engine_that_fails_loses_nothing_and_is_heard(tmp_path):
    def fail(call):
        if call == 2 + 16 + 9:
            raise RuntimeError("the engine broke")

    saved: list[Path] = []
    trainer = make_trainer(tmp_path, NumberEngine(fail), saved=saved)
    with pytest.raises(RuntimeError, match="the engine broke"):
        trainer.run()
    assert torch.equal(trainer.engine.weights, weights_after(tmp_path, 1))
    assert len(list(read_lines(tmp_path / "run" / "metrics.jsonl"))) == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and saved


def test_a_full_disk_stops_the_run_before_the_weights_move(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    write = os.write

    def full(descriptor, data):
        if trainer.es.journal is not None:  # the header was written
            write(descriptor, data[:20])
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr("os.write", full)
    with pytest.raises(EsfastError, match=r"cannot write .*journal\.esj': No space left"):
        trainer.run()
    assert not trainer.engine.weights.any()
    assert read_journal(tmp_path / "run").records == ()


def test_a_line_that_cannot_be_written_whole_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"n": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EsfastError, match="No space left"):
        append_line(path, {"n": 2})
    assert list(read_lines(path)) == [{"n": 1}]


def test_failed_rewards_are_counted_and_shown(tmp_path):
    trainer = make_trainer(tmp_path, task=Targets(fail_on=("3",)), generations=2)
    result = trainer.run()
    assert result.failed_rewards == 2 * 16
    assert "16 rewards failed" in shown(trainer)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["failed_rewards"] == 32


def test_a_run_shows_a_line_a_generation_when_piped(tmp_path):
    trainer = make_trainer(tmp_path, generations=3)
    result = trainer.run()
    print_result(trainer.progress.console, result, tmp_path / "run")
    text = shown(trainer)
    lines = [line for line in text.splitlines() if line.startswith("generation")]
    assert len(lines) == 3
    assert "held-out" in lines[1] and "tokens/s" in lines[0] and "left 0:0" in lines[0]
    assert f"held-out score  {result.before.text()} -> {result.after.text()}" in text
    assert text.count("  before  ") == 4 and "peak memory" in text and "\x1b" not in text


def test_what_a_model_wrote_cannot_move_the_cursor():
    assert _shown(" a\nb\x1b[2Jc é ") == "a\\nb\\x1b[2Jc é"
    assert len(_shown("x" * 999)) == 200


def test_a_folder_in_use_is_refused(tmp_path):
    RunFolder(tmp_path / "run", {})
    with pytest.raises(ConfigError, match="--output"):
        RunFolder(tmp_path / "run", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output"):
        RunFolder(tmp_path / "file" / "run", {})


@pytest.mark.parametrize("setting", ["generations", "prompts", "eval_every", "eval_size"])
def test_settings_below_one_are_refused(setting):
    with pytest.raises(ConfigError, match=setting):
        TrainConfig(StrategyConfig(), Sampling(4), **{setting: 0})


@pytest.mark.parametrize("value", [2.5, True, "3", None, 2**31, -1])
@pytest.mark.parametrize("setting", ["generations", "snapshot_every"])
def test_settings_that_are_no_count_are_told_by_name(setting, value):
    with pytest.raises(ConfigError, match=f"{setting} is {value!r}; expected a whole number"):
        TrainConfig(StrategyConfig(), Sampling(4), **{setting: value})


def test_plots_are_drawn_from_the_folder(tmp_path):
    make_trainer(tmp_path).run()
    pictures = draw_run(tmp_path / "run")
    assert [path.name for path in pictures] == ["reward.png", "held_out.png", "time.png"]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in pictures)
    assert b"esfast 0, noise 1, t, now: test" in pictures[0].read_bytes()


def legends_over_curves(folder, monkeypatch) -> list[bool]:
    """Of each legend of a run's pictures, whether it lies where curves run."""
    from matplotlib.figure import Figure

    covered = []

    def look(figure, *_, **__):
        figure.draw_without_rendering()
        for axes in figure.axes:
            if axes.get_legend() is not None:
                inside = axes.get_window_extent()
                covered.append(axes.get_legend().get_window_extent().overlaps(inside))

    monkeypatch.setattr(Figure, "savefig", look)
    draw_run(folder)
    return covered


def test_no_legend_covers_a_curve(tmp_path, monkeypatch):
    make_trainer(tmp_path).run()
    assert legends_over_curves(tmp_path / "run", monkeypatch) == [False, False]


@pytest.mark.parametrize(
    ("width", "terminal", "most"),
    [(120, True, 99), (80, True, 80), (40, True, 80), (40, False, 99)],
)
def test_a_generation_is_a_line_of_the_terminal(width, terminal, most):
    page = io.StringIO()
    console = Console(file=page, width=width, force_terminal=terminal, _environ={})
    with RunProgress(500, 30, console) as progress:
        progress.member(499, 29)
        report = GenerationReport(500, 0.5, 0.1, 0.9, 0, 1234.0, 60.0, 0.05, 0)
        progress.generation(report, HeldOut(500, (Score(0.5),), ("",)))
    (line,) = [line for line in page.getvalue().splitlines() if "reward" in line]
    line = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", line)
    assert len(line) <= most and ("outside" in line) == ("left" in line) == (most > 80)


def test_tensorboard_gets_the_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make_trainer(tmp_path, generations=4)
    trainer.loggers = make_loggers(["tensorboard"], tmp_path / "run", {})
    trainer.run()
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    means = [event.value for event in events.Scalars("reward_mean")]
    assert means == pytest.approx([row["reward_mean"] for row in rows], rel=1e-6)
    assert [event.step for event in events.Scalars("held_out_score")] == [0, 2, 4]


def test_tensorboard_shows_a_repeated_generation_once_and_at_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    killed, again = (TensorBoardLogger(tmp_path) for _ in range(2))
    for generation in (0, 1, 2, 3):
        killed.log(generation, {"reward_mean": 1.0})  # never closed
    for generation in (2, 3, 4):
        again.log(generation, {"reward_mean": 2.0})
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in found.Scalars("reward_mean")]
    assert shown == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]


def test_trackio_gets_the_numbers(tmp_path, monkeypatch):
    (tmp_path / "trackio.py").write_text(
        "calls = []\n"
        "def init(**k): calls.append(('init', k['resume'], k['project'], k['name']))\n"
        "def log(numbers, step): calls.append(('log', step, numbers))\n"
        "def finish(): calls.append(('finish',))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    trainer = make_trainer(tmp_path, generations=2)
    trainer.loggers = make_loggers(["trackio"], tmp_path / "run", {})
    trainer.run()
    import trackio

    assert [call[:2] for call in trackio.calls] == [
        ("init", "never"),
        ("log", 0),
        ("log", 1),
        ("log", 2),
        ("finish",),
    ]
    (logger,) = make_loggers(["trackio"], tmp_path / "run", {})
    logger.log(3, {})  # as a run that goes on
    assert trackio.calls[5:] == [("init", "allow", "esfast", "run"), ("log", 3, {})]


class LosingItsServer:
    def __init__(self, when: int) -> None:
        self.when, self.seen = when, []

    def log(self, generation, numbers):
        self.seen.append(generation)
        if generation == self.when:
            raise OSError("the server is gone")

    def close(self):
        raise RuntimeError("cannot close")


def test_a_logger_that_fails_costs_no_run(tmp_path, monkeypatch):
    trainer, said = make_trainer(tmp_path, generations=3), []
    monkeypatch.setattr(trainer.progress, "note", said.append)
    one, other = trainer.loggers = [LosingItsServer(1), LosingItsServer(9)]
    assert trainer.run().status == "finished"
    assert one.seen == [0, 1] and other.seen == [0, 1, 2, 3]
    told = [text for text in said if "gets no more numbers" in text]
    assert [text.partition("(")[2] for text in told] == [
        "OSError: the server is gone)",
        "RuntimeError: cannot close)",
    ]
    assert len(list(read_lines(tmp_path / "run" / "metrics.jsonl"))) == 3


def test_a_missing_logger_is_refused_by_name():
    with pytest.raises(ConfigError, match="tensorboard, trackio"):
        require_packages(["nowhere"])
