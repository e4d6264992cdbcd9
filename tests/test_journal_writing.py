"""Writing a journal: a record is there whole and synced or it is not, whatever fails meanwhile."""

from __future__ import annotations

import copy
import os
import pickle
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from journals import HEADER, WHOLE, generation, same, written

from esfast import (
    Anchor,
    AnchoredDecay,
    ConfigError,
    DataError,
    EsfastError,
    EvolutionStrategy,
    ParameterTable,
    StateError,
    Weights,
)
from esfast.journal import JournalWriter, export_journal, read_journal
from esfast.journal_format import MarkRecord, SegmentRecord
from esfast.replay import keep_journal


def test_a_journal_is_made_once(tmp_path):
    path = written(tmp_path / "j", [])
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        JournalWriter.create(path, HEADER)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["j"]


def test_one_process_writes_at_a_time(tmp_path):
    with JournalWriter.create(tmp_path / "j", HEADER) as writer:
        with pytest.raises(StateError, match="another process"):
            JournalWriter.resume(tmp_path / "j")
        writer.append(generation(0))
    with JournalWriter.resume(tmp_path / "j") as writer:
        assert writer.generation == 1
    with pytest.raises(StateError, match="closed"):
        writer.append(generation(1))


def test_a_fork_leaves_the_journal_to_its_parent(tmp_path):
    """It knows the end from before, and would cut off what the parent has written since."""
    with JournalWriter.create(tmp_path / "run.esj", HEADER) as journal:
        child = os.fork()
        if child == 0:
            try:
                journal.append(generation(0))
                os._exit(1)
            except BaseException as error:
                os._exit(0 if "is closed" in str(error) else 2)
        journal.append(generation(0))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pytest.raises(StateError, match="another process"):
            JournalWriter.resume(tmp_path / "run.esj")
        journal.append(generation(1))
    assert len(read_journal(tmp_path / "run.esj").generations) == 2


def test_the_lock_of_a_run_that_ended_is_not_kept_by_its_forks(tmp_path):
    with JournalWriter.create(tmp_path / "run.esj", HEADER):
        ready, told = os.pipe()
        over, end = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(told, b".")
            os.close(end)
            os.read(over, 1)
            os._exit(0)
        os.read(ready, 1)
    JournalWriter.resume(tmp_path / "run.esj").close()
    os.close(end)
    assert os.waitpid(child, 0)[1] == 0


def test_a_torn_end_is_cut_off_when_the_run_goes_on(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(WHOLE[:-30])
    with JournalWriter.resume(path) as writer:
        assert writer.journal.torn is not None and "record 11" in writer.journal.torn
        writer.append(MarkRecord(9, "1" * 16))
    assert path.read_bytes() == WHOLE


def test_nothing_is_left_of_a_torn_end(tmp_path):
    """A torn record that is longer than what is written next."""
    path = written(tmp_path / "j", [generation(n) for n in range(4)])
    path.write_bytes(path.read_bytes()[:-1])
    with JournalWriter.resume(path) as writer:
        writer.append(MarkRecord(3, "1" * 16))
    journal = read_journal(path)
    assert journal.torn is None and same(journal.records[-1], MarkRecord(3, "1" * 16))


@pytest.mark.parametrize("bad", [generation(5), MarkRecord(3, "0" * 16), SegmentRecord(1, {})])
def test_a_record_out_of_order_is_not_written(tmp_path, bad):
    with JournalWriter.create(tmp_path / "j", HEADER) as writer:
        before = (tmp_path / "j").read_bytes()
        with pytest.raises(StateError, match="apart"):
            writer.append(bad)
        assert (tmp_path / "j").read_bytes() == before


def test_a_header_that_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(DataError, match="checksum_every is 0"):
        JournalWriter.create(tmp_path / "j", replace(HEADER, checksum_every=0))
    assert not list(tmp_path.iterdir())


def test_an_exported_journal_is_not_continued(tmp_path):
    JournalWriter.create(tmp_path / "j", HEADER).close()
    export_journal(read_journal(tmp_path / "j"), tmp_path / "tuned.esj")
    before = (tmp_path / "tuned.esj").read_bytes()
    with pytest.raises(DataError, match="replayed and not continued"):
        JournalWriter.resume(tmp_path / "tuned.esj")
    assert (tmp_path / "tuned.esj").read_bytes() == before


def test_what_could_not_be_read_is_not_written(tmp_path):
    with JournalWriter.create(tmp_path / "j", HEADER) as writer:
        with pytest.raises(StateError, match="5 coefficients for 6 draws"):
            writer.append(generation(0, coefficients=np.ones(5, "f4")))
        for failed in (-1, None, 1 << 32):
            with pytest.raises(StateError, match="cannot be recorded"):
                writer.append(generation(0, failed=failed))
        writer.append(generation(0))
    assert len(read_journal(tmp_path / "j").generations) == 1


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    es = EvolutionStrategy(torch.nn.Linear(2, 1), sigma=0.1, alpha=0.1, population_size=2)
    for use in (lambda path: keep_journal(es, path), read_journal):
        with pytest.raises(DataError, match=r"no journal can be .*File name too long"):
            use(tmp_path / ("x" * 256))


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path):
    """A real limit on the size of files: the write stops in the middle of a record."""
    path = tmp_path / "j"
    with JournalWriter.create(path, HEADER) as writer:
        writer.append(generation(0))
        before = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))
        try:
            with pytest.raises(
                EsfastError, match=r"cannot write .*What was written before is whole"
            ):
                writer.append(generation(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
        writer.append(generation(1))
    assert len(read_journal(path).generations) == 2


def test_a_sync_that_fails_takes_the_record_back(tmp_path, monkeypatch):
    path = tmp_path / "j"
    with JournalWriter.create(path, HEADER) as writer:
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "I/O error")))
            with pytest.raises(EsfastError, match="I/O error"):
                writer.append(generation(0))
        assert path.read_bytes() == before
        writer.append(generation(0))


def interrupting(number):
    """A profile function that raises KeyboardInterrupt at the n-th call or return inside esfast."""
    seen = 0

    def profile(frame, event, argument):
        nonlocal seen
        if "esfast" in Path(frame.f_code.co_filename).parts and event != "c_call":
            seen += 1
            if seen == number:
                raise KeyboardInterrupt

    return profile


def test_an_interrupt_anywhere_leaves_a_whole_journal(tmp_path):
    """Ctrl-C at any call of append: the record is there or it is not, and the next one fits."""
    number, interrupted = 0, True
    while interrupted:
        number += 1
        path = tmp_path / str(number)
        with JournalWriter.create(path, HEADER) as writer:
            writer.append(generation(0))
            interrupted = False
            sys.setprofile(interrupting(number))
            try:
                writer.append(generation(1))
            except KeyboardInterrupt:
                interrupted = True
            finally:
                sys.setprofile(None)
            done = writer.generation
            writer.append(MarkRecord(done, "1" * 16))
        journal = read_journal(path)
        assert journal.torn is None and len(journal.generations) == done
        assert done in (1, 2) and isinstance(journal.records[-1], MarkRecord), number
    assert number > 15 and done == 2


def test_a_record_is_synced_before_append_returns(tmp_path, monkeypatch):
    events: list[str] = []
    write, sync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda *a: events.append("write") or write(*a))
    monkeypatch.setattr(os, "fsync", lambda *a: events.append("sync") or sync(*a))
    with JournalWriter.create(tmp_path / "j", HEADER) as writer:
        assert events == ["write", "sync", "sync"]  # the header, then the folder's entry
        events.clear()
        writer.append(generation(0))
    assert events == ["write", "sync"]
    events.clear()
    JournalWriter.resume(tmp_path / "j").close()
    assert events == ["sync"]  # its last record may never have been


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(EsfastError, match="nowhere/j': no such folder"):
        JournalWriter.create(tmp_path / "nowhere" / "j", HEADER)
    (tmp_path / "file").touch()
    with pytest.raises(EsfastError, match="file/j': Not a directory"):
        JournalWriter.create(tmp_path / "file" / "j", HEADER)
    with pytest.raises(EsfastError, match="x/j': File name too long"):
        JournalWriter.create(tmp_path / ("x" * 300) / "j", HEADER)


def kept(path: Path, **settings: object) -> EvolutionStrategy:
    table = ParameterTable.from_tensors({"w": torch.ones(9)})
    es = EvolutionStrategy(table, **{"population_size": 4, "alpha": 0.1, **settings})
    keep_journal(es, path)
    return es


@pytest.mark.parametrize(
    "changed",
    [{"seed": 5}, {"noise": "rademacher"}, {"rounding": "nearest"}, {"population_size": 6},
     {"antithetic": True}],
    ids=str,
)  # fmt: skip
def test_what_a_replay_would_not_know_is_not_written(tmp_path, changed):
    es = kept(tmp_path / "j")
    es.strategy.config = replace(es.config, sigma=0.5, alpha=0.2)  # a schedule, and recorded
    es.step(range(4))
    es.strategy.config = replace(es.config, **changed)
    before = es.weights.checksum()
    with pytest.raises(StateError, match=f"{next(iter(changed))} is .* the journal was begun with"):
        es.step(range(es.config.population_size))
    assert (es.weights.checksum(), es.generation, es.journal.generation) == (before, 1, 1)
    es.journal.close()
    assert kept(tmp_path / "j").weights.checksum() == before


def test_an_update_that_would_be_refused_is_not_written(tmp_path):
    """Each coefficient is a finite fp32 number, but not their sum: no replay would get past it."""
    es = kept(tmp_path / "j", shaping="raw", alpha=1.0)
    with pytest.raises(ConfigError, match="add up to"):
        es.step([8e38, 8e38, -8e38, 8e38])
    assert (es.generation, es.journal.generation) == (0, 0)


def test_decay_that_a_journal_has_no_anchor_for_is_not_written(tmp_path):
    es = kept(tmp_path / "j")
    es.strategy.config = replace(es.config, decay=AnchoredDecay("l2", 0.5))
    with pytest.raises(StateError, match="no anchor"):
        es.step(range(4))
    es.weights = Weights(es.weights.table, anchor=Anchor.in_memory(es.weights.table))
    with pytest.raises(StateError, match="names no anchor"):
        es.step(range(4))
    assert (es.generation, es.journal.generation) == (0, 0)
    es = kept(tmp_path / "k", decay=AnchoredDecay("l2", 0.0))
    es.strategy.config = replace(es.config, decay=AnchoredDecay("l1", 0.5))
    es.step(range(4))
    es.journal.close()
    again = kept(tmp_path / "k", decay=AnchoredDecay("l2", 0.0))
    assert again.weights.checksum() == es.weights.checksum()


SCRIPT = """
import sys, torch, esfast
es = esfast.EvolutionStrategy(torch.nn.Linear(2, 2), population_size=4)
esfast.keep_journal(es, sys.argv[1])
es.step(range(4))
"""


def test_a_script_that_ends_with_its_journal_open_says_nothing(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "j")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(read_journal(tmp_path / "j").generations) == 1


def test_a_writer_that_nobody_has_gives_its_lock_up(tmp_path):
    for number in range(3):  # as a notebook's cell that is run again
        es = kept(tmp_path / "j")
        assert es.generation == number
        es.step(range(4))
        del es
    writer = JournalWriter.resume(tmp_path / "j")
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(StateError, match="cannot be copied or pickled"):
            copied(writer)
