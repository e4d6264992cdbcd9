"""What a resumed run does to its folder: nothing is lost of a generation that was stopped in its
evaluation, and nothing is changed before the model is known to be the run's own.
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from number_engine import NumberEngine
from test_resume import trainer

from esfast import AnchoredDecay, DataError, cli
from esfast.engines.base import Completion
from esfast.ray_command import require_launcher
from esfast.replay import replay
from esfast.report import result_lines
from esfast.resume import flags_of, resumed
from esfast.run_folder import read_json, read_lines, require_journal
from esfast.train_flags import add_train_arguments

CLOCKS = {"seconds", "total_seconds", "tokens_per_second", "outside_share"}


class Power(BaseException):
    """The machine goes off: nothing that the run would still do is done."""


def lines_of(run: Path) -> list[dict[str, Any]]:
    """Without what the clock says, and saturated weights, which a kill may leave uncounted."""
    rows = list(read_lines(run / "metrics.jsonl"))
    return [{name: row[name] for name in row.keys() - CLOCKS} for row in rows]


class Counting(NumberEngine):
    """Says how long its prompts were, so that the run's cost is known."""

    def generate(self, prompts: Any, sampling: Any) -> list[Completion]:
        return [replace(c, prompt_tokens=3) for c in super().generate(prompts, sampling)]


def stops(call: int, how: str) -> NumberEngine:
    def stop(now: int) -> None:
        if now == call and how == "SIGINT":
            signal.raise_signal(signal.SIGINT)
        if now == call and how == "error":
            raise RuntimeError("the engine broke")
        if now == call:
            raise Power

    return Counting(stop)


# Two calls before the first generation (held-out, warm-up), 16 a generation, one an evaluation.
FIRST, SECOND = 2 + 32, 2 + 32 + 1 + 32  # held-out after generations 2 and 4


@pytest.mark.parametrize("call", [FIRST, SECOND])
@pytest.mark.parametrize("how", ["SIGINT", "error", "power"])
def test_a_run_stopped_in_its_evaluation_loses_no_line(
    tmp_path: Path, how: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(tmp_path / "whole", engine=Counting())
    whole.run()
    stopped = trainer(tmp_path / "run", engine=stops(call, how))
    if how == "power":
        monkeypatch.setattr(stopped, "_fail", lambda: stopped._leave_journal())
    try:
        stopped.run()
    except (RuntimeError, Power):
        assert how != "SIGINT"
    again = trainer(tmp_path / "run", engine=Counting(), goes_on=True)
    again.run()
    assert torch.equal(again.engine.weights, whole.engine.weights)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")
    assert not (tmp_path / "run" / "pending.json").exists()
    summaries = [read_json(tmp_path / name / "summary.json") for name in ("whole", "run")]
    for key in ("generations", "held_out_after", "rise", "failed_rewards"):
        assert summaries[0][key] == summaries[1][key]
    assert summaries[0]["cost"] == summaries[1]["cost"]


def test_a_finished_run_that_goes_on_counts_no_answer_twice(tmp_path: Path) -> None:
    trainer(tmp_path / "run", engine=Counting()).run()
    first = read_json(tmp_path / "run" / "summary.json")
    trainer(tmp_path / "run", engine=Counting(), goes_on=True).run()
    again = read_json(tmp_path / "run" / "summary.json")
    assert again["held_out_after"] == first["held_out_after"]
    assert again["cost"] == first["cost"]


def test_held_out_answers_before_a_stop_in_the_prior_tasks_are_kept(tmp_path: Path) -> None:
    stopped = trainer(tmp_path / "run", engine=Counting())
    evaluate = stopped._evaluate_prior

    def stop(generation: int) -> None:
        if generation == 2:
            raise KeyboardInterrupt
        evaluate(generation)

    stopped._evaluate_prior = stop  # type: ignore[method-assign]
    stopped.run()
    held_out = lines_of(tmp_path / "run")[-1]["held_out"]
    assert held_out is not None and held_out["generation"] == 2
    trainer(tmp_path / "whole", engine=Counting()).run()
    trainer(tmp_path / "run", engine=Counting(), goes_on=True).run()
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


def test_a_line_that_is_kept_for_another_generation_is_none(tmp_path: Path) -> None:
    """Stopped between keeping the line and the journal: the generation is made again."""
    whole = trainer(tmp_path / "whole")
    whole.run()
    stopped = trainer(tmp_path / "run")
    append = stopped._step

    def stop(es: Any, earned: Any) -> int:
        if es.generation == 3:
            raise RuntimeError("stopped right here")
        return append(es, earned)

    stopped._step = stop  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        stopped.run()
    assert read_json(tmp_path / "run" / "pending.json")["generation"] == 4
    again = trainer(tmp_path / "run", goes_on=True)
    again.run()
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


def test_seconds_of_a_run_that_goes_on_are_those_of_all_its_parts(tmp_path: Path) -> None:
    trainer(tmp_path / "run", 4).run()
    last = list(read_lines(tmp_path / "run" / "metrics.jsonl"))[-1]["total_seconds"]
    spent = {name: 1000.0 + seconds for name, seconds in last.items()}
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace(json.dumps(last), json.dumps(spent)))
    trainer(tmp_path / "run", 6, goes_on=True).run()
    rows = list(read_lines(path))
    assert spent == rows[3]["total_seconds"]
    assert all(row["total_seconds"][name] > 1000 for row in rows[4:] for name in spent)
    assert all(read_json(tmp_path / "run" / "summary.json")["seconds"][n] > 1000 for n in spent)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("settings", [{}, {"strategy": {"decay": AnchoredDecay("l2", 1.0)}}])
def test_a_refused_resume_changes_nothing(tmp_path: Path, settings: Any) -> None:
    run = trainer(tmp_path / "run", 4, **settings)
    run.run()
    before = contents(tmp_path / "run")
    other = NumberEngine()
    other.weights += 0.5
    with pytest.raises(DataError, match="base weights have checksum"):
        trainer(tmp_path / "run", 6, engine=other, goes_on=True, **settings).run()
    assert contents(tmp_path / "run") == before
    on = trainer(tmp_path / "run", 6, goes_on=True, **settings)
    assert on.run().generations == 6


def test_ctrl_c_in_the_replay_keeps_the_model_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path / "run", 4).run()
    again, saved = trainer(tmp_path / "run", 6, goes_on=True), []
    monkeypatch.setattr(again, "_save_model", saved.append)

    def impatient(es: Any, journal: Any, *_: Any, **__: Any) -> None:
        replay(es, journal, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr("esfast.train.catch_up", impatient)
    result = again.run()
    assert (result.status, result.generations, saved) == ("interrupted", 0, [])


def test_ctrl_c_before_a_run_goes_on_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path / "run", 4).run()
    before = contents(tmp_path / "run")
    engine = NumberEngine()
    again = trainer(tmp_path / "run", 6, engine=engine, goes_on=True)
    monkeypatch.setattr(engine, "live_weights", lambda *a, **k: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        again.run()
        time.sleep(1)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("given", "torchrun", "launcher", "engines"),
    [
        ([], False, "ray", 4),
        (["--launcher", "auto"], False, "auto", None),
        ([], True, "auto", None),
        (["--engines", "1"], False, "ray", 1),
    ],
)
def test_a_run_goes_on_without_ray(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    torchrun: bool,
    launcher: str,
    engines: int | None,
) -> None:
    started = cli.build_parser().parse_args(["train", "--launcher", "ray", "--engines", "4"])
    flags = flags_of(started, add_train_arguments)
    (tmp_path / "config.json").write_text(json.dumps({"arguments": flags, "task": {}}))
    monkeypatch.setattr("esfast.resume.under_torchrun", lambda: torchrun)
    line = ["train", "--resume", str(tmp_path), *given]
    args = cli.build_parser().parse_args(line)
    args.command_line = ["esfast", *line]
    merged = resumed(args, add_train_arguments).args
    assert (merged.launcher, merged.engines) == (launcher, engines)
    monkeypatch.setattr("esfast.ray_command.under_torchrun", lambda: torchrun)
    require_launcher(merged)


def test_a_run_without_its_journal_is_not_begun_anew(tmp_path: Path) -> None:
    trainer(tmp_path / "run", 2).run()
    require_journal(tmp_path / "run")
    (tmp_path / "run" / "journal.esj").unlink()
    with pytest.raises(DataError, match=r"has metrics.jsonl but no journal.esj, so its weights"):
        require_journal(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    require_journal(tmp_path / "empty")


def test_a_rise_without_spread_is_no_infinity_in_json(tmp_path: Path) -> None:
    """Every prompt rises by the same: no error to count in."""
    result = trainer(tmp_path / "run", 1).run()
    better = [replace(score, value=score.value + 1.0) for score in result.before.scores]
    even = replace(result, after=replace(result.before, generation=1, scores=tuple(better)))
    record = json.loads(json.dumps(even.record(), allow_nan=False))
    assert (record["rise"], record["rise_in_standard_errors"]) == (1.0, None)
    assert "the same for every prompt" in "\n".join(result_lines(even))
