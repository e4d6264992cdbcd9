"""Replay: base + journal give the run's bits, on every target, thread count and memory mode."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import DTYPES, NOISES, assert_tensors, clones, nasty_bits, plain_bits, tensor_of, tensors

from esfast import (
    AnchoredDecay,
    ConfigError,
    DataError,
    EvolutionStrategy,
    Member,
    ParameterTable,
    StateError,
    Weights,
    _core,
)
from esfast.anchor import Anchor
from esfast.journal import Journal, JournalWriter, export_journal, read_journal
from esfast.journal_format import GenerationRecord, MarkRecord, SegmentRecord
from esfast.replay import catch_up, header_of, keep_journal, replay, require_base

DECAYS = (None, AnchoredDecay("l1", 0.5), AnchoredDecay("l2", 5.0))
GENERATIONS = 3
Model = dict[str, torch.Tensor]


def strategy(model: Model, memory: str = "lean", threads: int = 1, **settings: object):
    chosen = {"sigma": 0.02, "alpha": 0.02, "population_size": 6, "seed": 11, **settings}
    table = ParameterTable.from_tensors(model)
    return EvolutionStrategy(table, memory=memory, threads=threads, **chosen)


def run(
    es: EvolutionStrategy, path: Path, generations: int = GENERATIONS, first: int = 0
) -> Journal:
    """A journaled run whose rewards are drawn; the journal is closed with a mark."""
    with keep_journal(es, path, checksum_every=2) as writer:
        for number in range(first, generations):
            es.step(np.random.default_rng(number).normal(size=es.config.population_size))
        writer.append(MarkRecord(es.generation, es.weights.checksum()))
    return read_journal(path)


@pytest.fixture
def every_target() -> Iterator[list[str]]:
    before = _core.target()
    yield list(_core.targets())
    _core.set_target(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
def test_replay_is_the_run(noise, dtype, tmp_path, every_target):
    """Both decays and none, antithetic and not, all memories, each replayed on every target under
    another memory and thread count."""
    cases = itertools.product(DECAYS, (False, True), ("lean", "shadow", "master"))
    for number, (decay, antithetic, memory) in enumerate(cases):
        base = tensors(dtype, nasty_bits, number)
        settings = {"noise": noise, "decay": decay, "antithetic": antithetic}
        model = clones(base)
        journal = run(strategy(model, memory, **settings), tmp_path / f"{number}.esj")
        for target in every_target:
            _core.set_target(target)
            again = clones(base)
            other = {"lean": "shadow", "shadow": "lean", "master": "master"}[memory]
            es = strategy(again, other, threads=3, **settings)
            require_base(journal.header, es)
            assert replay(es, journal, verify=True) == 2
            assert_tensors(again, model, f"{decay} {antithetic} {memory} {target}")


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_replay_of_many_chunks_on_many_threads(rounding, tmp_path):
    base = {"w": tensor_of(plain_bits("bfloat16", 300_001), "bfloat16")}
    model, again = clones(base), clones(base)
    settings = {"rounding": rounding, "decay": DECAYS[2]}
    journal = run(strategy(model, threads=1, **settings), tmp_path / "j")
    replay(strategy(again, threads=5, **settings), journal, verify=True)
    assert_tensors(again, model)
    assert not torch.equal(model["w"], base["w"])


def test_replay_under_a_forced_target_in_another_process(tmp_path):
    base = {"w": tensor_of(plain_bits("float16", 5000), "float16")}
    model = clones(base)
    checksum = run(strategy(model), tmp_path / "j").records[-1].checksum
    torch.save(base, tmp_path / "base")
    code = (
        "import sys, torch; from esfast import *; from esfast.replay import keep_journal\n"
        "from esfast import _core\n"
        "table = ParameterTable.from_tensors(torch.load(sys.argv[2], weights_only=True))\n"
        "es = EvolutionStrategy(table, sigma=.02, alpha=.02, population_size=6, seed=11)\n"
        "keep_journal(es, sys.argv[1]); print(_core.target(), es.weights.checksum())"
    )
    environment = {**os.environ, "ESFAST_TARGET": "scalar"}
    command = [sys.executable, "-c", code, str(tmp_path / "j"), str(tmp_path / "base")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["scalar", checksum]


def test_an_exported_journal_leads_to_the_same_weights(tmp_path):
    base = tensors("bfloat16")
    model, again = clones(base), clones(base)
    export_journal(run(strategy(model, antithetic=True), tmp_path / "j"), tmp_path / "e")
    assert replay(strategy(again, antithetic=True), read_journal(tmp_path / "e"), verify=True) == 2
    assert_tensors(again, model)


def test_explicit_members_replay(tmp_path):
    """Members of one's own choice: the record holds their seeds."""
    base = tensors("bfloat16")
    model, again = clones(base), clones(base)
    es = strategy(model)
    with keep_journal(es, tmp_path / "j") as writer:
        own = tuple((1000 + n, 0) for n in range(4))
        values = np.array([1e-3, -2e-3, 3e-3, 5e-4], dtype=np.float32)
        record = GenerationRecord(0, 0.02, 0.02, None, values, members=own)
        writer.append(record)
        es.apply(record)
    plain = Weights(ParameterTable.from_tensors(again))
    members = [Member(1000 + n) for n in range(4)]
    plain.update(members, values, seed=es.strategy.generation_seed(0))
    assert_tensors(again, model)
    third = clones(base)
    replay(strategy(third), read_journal(tmp_path / "j"))
    assert_tensors(third, model)


def test_the_records_own_alpha_and_decay_count():
    """As of the record, not of the configuration."""
    base = tensors("bfloat16", plain_bits)
    model, plain = clones(base), clones(base)
    es = strategy(model, decay=DECAYS[2])
    record = replace(es.decide(np.arange(6.0)), alpha=0.11, decay=AnchoredDecay("l1", 0.01))
    es.apply(record)
    table = ParameterTable.from_tensors(plain)
    alone = Weights(table, anchor=Anchor.in_memory(table))
    alone.update(record.terms(es.config), record.coefficients, decay=AnchoredDecay("l1", 0.01),
                 alpha=0.11, seed=es.strategy.generation_seed(0))  # fmt: skip
    assert_tensors(model, plain)


def test_every_generation_can_be_had(tmp_path):
    base = tensors("bfloat16")
    model = clones(base)
    es = strategy(model, decay=DECAYS[1])
    states = [clones(model)]
    with keep_journal(es, tmp_path / "j", checksum_every=2) as _:
        for number in range(5):
            es.step(np.random.default_rng(number).normal(size=6))
            states.append(clones(model))
    journal = read_journal(tmp_path / "j")
    for until, state in enumerate(states):
        again = clones(base)
        seen: list[int] = []
        replay(strategy(again, decay=DECAYS[1]), journal, until, verify=True, after=seen.append)
        assert_tensors(again, state, f"until {until}")
        assert seen == list(range(1, until + 1))
    for until in (-1, 6):
        with pytest.raises(ConfigError, match="the journal holds 5"):
            replay(strategy(clones(base), decay=DECAYS[1]), journal, until)


def test_a_step_is_on_disk_before_the_weights_move(tmp_path, monkeypatch):
    model = tensors("bfloat16")
    es = strategy(model)
    update = es.weights.update
    held: list[int] = []

    def watched(*arguments: object, **options: object) -> object:
        held.append(len(read_journal(tmp_path / "j").generations))
        return update(*arguments, **options)

    monkeypatch.setattr(es.weights, "update", watched)
    with keep_journal(es, tmp_path / "j"):
        for _ in range(3):
            es.step(np.arange(6.0))
    assert held == [1, 2, 3]


def test_what_cannot_be_written_moves_nothing(tmp_path):
    model = tensors("bfloat16", plain_bits)
    before = clones(model)
    es = strategy(model)
    with keep_journal(es, tmp_path / "j"):
        with pytest.raises(DataError):
            es.step([1.0, 2.0])
        with pytest.raises((StateError, ConfigError), match="not a finite"):
            EvolutionStrategy.step(_overflowing(es), np.arange(6.0) * 1e300)
        assert_tensors(model, before)
    assert read_journal(tmp_path / "j").generations == ()


def _overflowing(es: EvolutionStrategy) -> EvolutionStrategy:
    es.strategy.config = replace(es.config, shaping="raw")
    return es


# --- another base, other settings, a run that is apart ----------------------------------------


def test_another_base_is_refused_before_anything_moves(tmp_path):
    base = tensors("bfloat16", plain_bits)
    journal = run(strategy(clones(base)), tmp_path / "j")
    two = torch.zeros(2, dtype=torch.bfloat16)
    norm = base["model.norm.weight"] + 0.25
    cases = {
        "have checksum": {**clones(base), "model.norm.weight": norm},
        "model.more": {**clones(base), "model.more": two},
        "'model.scale' is not there": {n: t for n, t in clones(base).items() if n != "model.scale"},
        "shape (2,)": {**clones(base), "model.scale": two},
        "float32": {name: tensor.float() for name, tensor in base.items()},
    }
    for said, model in cases.items():
        before = clones(model)
        with pytest.raises(DataError, match="that the run started from") as refused:
            catch_up(strategy(model), journal)
        assert_tensors(model, before, said)
        assert said in str(refused.value)


def test_another_anchor_is_refused(tmp_path):
    base = tensors("bfloat16", plain_bits)
    journal = run(strategy(clones(base), decay=DECAYS[2]), tmp_path / "j")
    model = clones(base)
    table = ParameterTable.from_tensors(model)
    shifted = ParameterTable.from_tensors({name: tensor + 1 for name, tensor in base.items()})
    anchor = Anchor.in_memory(shifted)
    es = EvolutionStrategy(table, replace(journal.header.config), anchor=anchor)
    with pytest.raises(DataError, match="the anchor has checksum"):
        catch_up(es, journal)


def test_a_changed_setting_is_refused_by_name(tmp_path):
    base = tensors("bfloat16", plain_bits)
    run(strategy(clones(base)), tmp_path / "j")
    changes = {"sigma": 0.03, "alpha": 0.01, "population_size": 8, "seed": 1, "noise": "hadamard",
               "antithetic": True, "shaping": "z_score", "rounding": "nearest",
               "decay": AnchoredDecay("l2", 1.0), "memory": "master"}  # fmt: skip
    before = (tmp_path / "j").read_bytes()
    for name, value in changes.items():
        with pytest.raises(ConfigError, match=rf"{name} .*the journal has"):
            keep_journal(strategy(clones(base), **{name: value}), tmp_path / "j")
        with pytest.raises(ConfigError, match=rf"{name} .*the journal has"):
            replay(strategy(clones(base), **{name: value}), read_journal(tmp_path / "j"))
    assert (tmp_path / "j").read_bytes() == before


def test_weights_that_are_apart_are_noticed(tmp_path):
    """Someone edits the model behind the run: its journal no longer leads to its weights."""
    base = tensors("bfloat16", plain_bits)
    model = clones(base)
    es = strategy(model)
    with keep_journal(es, tmp_path / "j", checksum_every=1):
        es.step(np.arange(6.0))
        model["model.norm.weight"][3] += 1
        es.step(np.arange(6.0))
    with pytest.raises(StateError, match="after 1 generations the weights have checksum"):
        replay(strategy(clones(base)), read_journal(tmp_path / "j"), verify=True)
    assert replay(strategy(clones(base)), read_journal(tmp_path / "j"), verify=False) == 0
    with pytest.raises(StateError, match="after 1 generations the weights have") as refused:
        keep_journal(strategy(clones(base)), tmp_path / "j")
    JournalWriter.resume(tmp_path / "j").close()  # what was refused keeps no lock,
    assert refused.value.__traceback__  # even while this has its frame


def test_every_generation_rounds_by_its_own_seed():
    model, plain = (clones(tensors("bfloat16")) for _ in range(2))
    es, weights = strategy(model), Weights(ParameterTable.from_tensors(plain))
    for number in range(2):
        record = es.decide(np.arange(6.0))
        es.apply(record)
        key = es.strategy.generation_seed(number)
        weights.update(record.terms(es.config), record.coefficients, seed=key)
    assert_tensors(model, plain)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"checksum_every": 0}, "checksum_every is 0"),
        ({"checksum_every": 2.5}, "checksum_every is 2.5"),
        ({"run": {"rate": np.float32(1)}}, "no JSON"),
    ],
)
def test_a_journal_that_could_not_be_read_is_not_begun(tmp_path, given, told):
    es = strategy(tensors("float32"))
    with pytest.raises(ConfigError, match=told):
        keep_journal(es, tmp_path / "run.esj", **given)
    assert not list(tmp_path.iterdir())
    keep_journal(es, tmp_path / "run.esj", checksum_every=np.int64(2)).close()
    if "run" in given:  # the same where a run goes on
        with pytest.raises(ConfigError, match=told):
            keep_journal(es, tmp_path / "run.esj", **given)


def test_a_journal_starts_at_the_start():
    es = strategy(tensors("bfloat16"))
    es.step(np.arange(6.0))
    with pytest.raises(StateError, match="from the start"):
        header_of(es)
    with pytest.raises(StateError, match="in order, each once"):
        es.apply(strategy(tensors("bfloat16")).decide(np.arange(6.0)))


# --- going on ---------------------------------------------------------------------------------


def test_a_run_goes_on_inside_an_open_loop(tmp_path):
    base = tensors("bfloat16", plain_bits)
    run(strategy(clones(base)), tmp_path / "j")
    es = strategy(clones(base))
    for _ in es.population():
        keep_journal(es, tmp_path / "j").close()
        break
    assert es.generation == GENERATIONS


def test_a_run_goes_on_from_its_journal(tmp_path):
    base = tensors("bfloat16", plain_bits)
    whole = clones(base)
    run(strategy(whole), tmp_path / "whole", 6)
    part = clones(base)
    es = strategy(part)
    with keep_journal(es, tmp_path / "part"):
        for number in range(4):
            es.step(np.random.default_rng(number).normal(size=6))
    again = clones(base)
    journal = run(strategy(again, "shadow"), tmp_path / "part", 6, first=4)
    assert_tensors(again, whole)
    assert [type(r) for r in journal.records].count(SegmentRecord) == 1
    assert len(journal.generations) == 6


def test_a_torn_end_is_told_and_done_again(tmp_path):
    base = tensors("bfloat16", plain_bits)
    whole = clones(base)
    es = strategy(whole)
    with keep_journal(es, tmp_path / "j"):
        for number in range(4):
            es.step(np.random.default_rng(number).normal(size=6))
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data[:-7])
    again = clones(base)
    es = strategy(again)
    with pytest.warns(UserWarning, match="record 3 .*never written whole"):
        writer = keep_journal(es, tmp_path / "j")
    assert es.generation == 3
    es.step(np.random.default_rng(3).normal(size=6))
    writer.close()
    assert_tensors(again, whole)


def test_the_anchor_stays_the_original_base(tmp_path):
    """A run that is resumed pulls to where it started, not to where it stopped."""
    base = tensors("bfloat16", plain_bits)
    settings = {"decay": AnchoredDecay("l2", 20.0)}
    whole, again = clones(base), clones(base)
    run(strategy(whole, **settings), tmp_path / "whole", 6)
    run(strategy(clones(base), **settings), tmp_path / "part", 3)
    run(strategy(again, **settings), tmp_path / "part", 6, first=3)
    assert_tensors(again, whole)
