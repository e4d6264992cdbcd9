"""A fast-slow run repeats, and one that was killed anywhere goes on to the same bits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from instruction_engine import InstructionEngine, Stubborn, make_trainer
from number_engine import interrupt_at

from esfast import DataError
from esfast.fast_slow.cycles import PROMPTS, read_cycles
from esfast.fast_slow.trainer import FastSlowTrainer
from esfast.journal import read_journal
from esfast.run_folder import RunFolder, read_json, read_lines

pytest.importorskip("gepa")


def trail(folder: Path) -> tuple[Any, Any]:
    """What decides a run's weights: the prompts and the coefficients."""
    cycles = [{**c.record(), "seconds": 0} for c in read_cycles(folder)]
    return cycles, [r.coefficients.tobytes() for r in read_journal(folder).generations]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> FastSlowTrainer:
    trainer = make_trainer(tmp_path_factory.mktemp("whole") / "run")
    trainer.run()
    return trainer


def test_a_run_repeats_and_another_seed_does_not(tmp_path, whole):
    again = make_trainer(tmp_path / "again")
    again.run()
    other = make_trainer(tmp_path / "other", strategy={"seed": 6})
    other.run()
    assert trail(tmp_path / "again") == trail(whole.folder.path)
    assert torch.equal(again.engine.weights, whole.engine.weights)
    assert trail(tmp_path / "other") != trail(whole.folder.path)
    asked = [sampling.seed for prompts, sampling in again.engine.seen if sampling.temperature]
    assert len(set(asked)) == len(asked) > 3, "each reflection draws anew"


class Killed(BaseException):
    """The process ends here: nothing more is written."""


def killed_at(call: int) -> InstructionEngine:
    def end(now: int) -> None:
        if now == call:
            raise Killed

    return InstructionEngine(end)


def killed(trainer: FastSlowTrainer, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "_fail", trainer._leave_journal)
    with pytest.raises(Killed):
        trainer.run()


def require_the_same(folder: Path, whole: FastSlowTrainer, engine: Any = None) -> None:
    again = make_trainer(folder, engine, goes_on=True)
    assert again.run().status == "finished"
    assert trail(folder) == trail(whole.folder.path)
    assert torch.equal(again.engine.weights, whole.engine.weights)
    rows = [list(read_lines(path / "metrics.jsonl")) for path in (folder, whole.folder.path)]
    scores = [[(r["held_out"], r["held_out_best_prompt"]) for r in one] for one in rows]
    assert scores[0] == scores[1]
    summaries = [read_json(path / "summary.json") for path in (folder, whole.folder.path)]
    assert summaries[0]["fast_slow"] == summaries[1]["fast_slow"]
    assert summaries[0]["cost"] == summaries[1]["cost"]


def test_a_run_killed_at_any_answer_goes_on_to_the_same_bits(tmp_path, whole, monkeypatch):
    calls = len(whole.engine.seen)
    assert calls > 60
    for call in range(calls):
        folder = tmp_path / str(call)
        killed(make_trainer(folder, engine=killed_at(call)), monkeypatch)
        require_the_same(folder, whole)


def test_ctrl_c_in_a_search_leaves_a_run_that_goes_on(tmp_path, whole):
    searching = [len(prompts) for prompts, _ in whole.engine.seen].index(3)

    def slow(call: int) -> None:
        time.sleep(0.2 if call == searching else 0)
        interrupt_at(searching)(call)

    stopped = make_trainer(tmp_path / "run", InstructionEngine(slow))
    assert stopped.run().status == "interrupted"
    assert not (tmp_path / "run" / PROMPTS).exists()
    seconds = read_json(tmp_path / "run" / "summary.json")["seconds"]
    assert seconds["prompt search"] > 0.1 > seconds["records"], "nor is its time lost in another's"
    require_the_same(tmp_path / "run", whole)


def test_ctrl_c_between_both_held_out_scores_counts_neither(tmp_path, whole):
    best = len(whole.engine.seen) - 1  # the held-out prompts under the best prompt, at the end
    stopped = make_trainer(tmp_path / "run", InstructionEngine(interrupt_at(best)))
    assert stopped.run().status == "interrupted"
    require_the_same(tmp_path / "run", whole)


def test_answers_under_a_first_instruction_that_stays_the_best_count_once(tmp_path, monkeypatch):
    """The end of the cycle before counted them; a run that goes on there makes them again."""
    whole = make_trainer(tmp_path / "whole", Stubborn())
    whole.run()
    assert [cycle.prompts[0] for cycle in whole.cycles] == ["Count."] * 2
    searching = [call for call, (prompts, _) in enumerate(whole.engine.seen) if len(prompts) == 3]

    def end(now: int) -> None:
        if now == searching[-1]:
            raise Killed

    killed(make_trainer(tmp_path / "run", Stubborn(end)), monkeypatch)
    assert len(read_cycles(tmp_path / "run")) == 1
    require_the_same(tmp_path / "run", whole, Stubborn())


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", [PROMPTS, "pending.json", "metrics.jsonl"])
def test_a_run_killed_at_a_file_goes_on_to_the_same_bits(tmp_path, whole, monkeypatch, name, after):
    for count in (1, 2):
        folder = tmp_path / f"{count}"
        trainer = make_trainer(folder)
        end_at(trainer.folder, name, count, after, monkeypatch)
        killed(trainer, monkeypatch)
        require_the_same(folder, whole)


def end_at(folder: RunFolder, name: str, count: int, after: bool, monkeypatch) -> None:
    """Ends the process before or after the `count`-th write of the file."""
    method = {"metrics.jsonl": "add_metrics", PROMPTS: "write_lines"}.get(name, "write")
    write, seen = getattr(folder, method), []

    def ending(*arguments: Any) -> None:
        its_own = method == "add_metrics" or arguments[0] == name
        seen.extend([name] if its_own else [])
        now = its_own and len(seen) == count
        if now and not after:
            raise Killed
        write(*arguments)
        if now:
            raise Killed

    monkeypatch.setattr(folder, method, ending)


def test_prompts_that_are_lost_are_not_made_up(tmp_path, whole, monkeypatch):
    folder = tmp_path / "run"
    killed(make_trainer(folder, engine=killed_at(len(whole.engine.seen) - 3)), monkeypatch)
    lines = (folder / PROMPTS).read_text().splitlines(keepends=True)
    journal = (folder / "journal.esj").read_bytes()
    (folder / PROMPTS).write_text(lines[0])
    with pytest.raises(DataError, match="has 1 cycles, and the journal is 3 generations"):
        make_trainer(folder, goes_on=True).run()
    (folder / PROMPTS).write_text("".join(reversed(lines)))
    with pytest.raises(DataError, match="not one line a cycle"):
        make_trainer(folder, goes_on=True).run()
    broken = json.loads(lines[0]) | {"prompts": ["Mine."]}
    (folder / PROMPTS).write_text(json.dumps(broken) + "\n" + lines[1])
    with pytest.raises(DataError, match="not those of its candidates"):
        make_trainer(folder, goes_on=True).run()
    assert (folder / "journal.esj").read_bytes() == journal
    (folder / PROMPTS).write_text("".join(lines))
    require_the_same(folder, whole)


def test_a_run_may_get_more_cycles(tmp_path, whole):
    make_trainer(tmp_path / "run", generations=2).run()
    require_the_same(tmp_path / "run", whole)
