"""Snapshots: replay starts from one that fits its journal, and otherwise from the base."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import assert_tensors, clones, nasty_bits, plain_bits, tensors
from test_replay import DECAYS, Model, run, strategy

from esfast import Member, ParameterError
from esfast.journal import Journal, read_journal
from esfast.replay import catch_up, keep_journal
from esfast.snapshots import load_snapshot, save_snapshot


def snapshot_run(tmp_path: Path, memory: str, model: Model) -> Journal:
    es = strategy(model, memory, decay=DECAYS[2])
    with keep_journal(es, tmp_path / "j") as writer:
        for number in range(6):
            es.step(np.random.default_rng(number).normal(size=6))
            if number in (1, 3):
                save_snapshot(tmp_path / "s", es.weights, es.generation, writer.chain)
    return read_journal(tmp_path / "j")


@pytest.mark.parametrize("memory", ["lean", "shadow", "master"])
def test_a_snapshot_spares_replay_and_changes_nothing(memory, tmp_path):
    base = tensors("bfloat16", nasty_bits)
    model, again = clones(base), clones(base)
    journal = snapshot_run(tmp_path, memory, model)
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["generation-000004.safetensors"]
    es = strategy(again, memory, decay=DECAYS[2])
    steps: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        catch_up(es, journal, tmp_path / "s", after=steps.append)
    assert steps == [5, 6]
    assert_tensors(again, model)
    es.weights.perturb(Member(3), 0.5)
    es.weights.restore()
    assert_tensors(again, model)


@pytest.mark.parametrize("memory", ["lean", "shadow", "master"])
def test_a_snapshot_of_the_end_needs_no_replay(memory, tmp_path):
    """Live weights, and the base that members start from, are the snapshot's."""
    base = tensors("bfloat16", plain_bits)
    model, again = clones(base), clones(base)
    es = strategy(model, memory)
    with keep_journal(es, tmp_path / "j") as writer:
        for number in range(2):
            es.step(np.random.default_rng(number).normal(size=6))
        save_snapshot(tmp_path / "s", es.weights, es.generation, writer.chain)
    resumed = strategy(again, memory)
    catch_up(resumed, read_journal(tmp_path / "j"), tmp_path / "s")
    assert_tensors(again, model)
    for run_of in (es, resumed):
        run_of.weights.perturb(Member(5), 0.3)
    assert_tensors(again, model)


def test_a_snapshot_of_another_kind_is_passed_over(tmp_path):
    base = tensors("bfloat16", plain_bits)
    model, again = clones(base), clones(base)
    journal = snapshot_run(tmp_path, "lean", model)
    path = tmp_path / "s" / "generation-000004.safetensors"
    good = path.read_bytes()
    damaged = {"flipped": good[:-9] + bytes([good[-9] ^ 1]) + good[-8:], "cut": good[:-40],
               "empty": b"", "text": b"not a tensor", "long": good + b"1"}  # fmt: skip
    for what, data in damaged.items():
        path.write_bytes(data)
        fresh, notes = clones(base), []
        es = strategy(fresh, decay=DECAYS[2])
        assert load_snapshot(tmp_path / "s", es.weights, journal, notes.append) == 0, what
        assert_tensors(fresh, base, what)
        assert len(notes) == 1 and "passed over" in notes[0]
    path.write_bytes(good)
    other = run(strategy(clones(base), seed=12, decay=DECAYS[2]), tmp_path / "other", 6)
    es = strategy(again, decay=DECAYS[2])
    assert load_snapshot(tmp_path / "s", es.weights, other, lambda text: None) == 0
    catch_up(es, journal, tmp_path / "s")
    assert_tensors(again, model)


@pytest.mark.parametrize("memory", ["lean", "shadow", "master"])
def test_what_was_made_in_inference_mode_takes_a_state_outside(memory):
    with torch.inference_mode():
        model = tensors("bfloat16")
        weights = strategy(model, memory).weights
    state = [tensor.clone() for tensor in weights.state()]
    before = weights.checksum()
    weights.update([Member(1)], [1.0])
    weights.load_state(state)
    assert weights.checksum() == before


def test_a_state_of_another_table_is_refused():
    weights = strategy(tensors("bfloat16")).weights
    with pytest.raises(ParameterError, match="does not fit this table of 5 segments"):
        weights.load_state([torch.zeros(3)])
