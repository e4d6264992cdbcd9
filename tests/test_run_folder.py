"""A run's folder against other processes, and against what killed ones left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from journals import HEADER

from esfast import ConfigError, EsfastError, StateError
from esfast.checkpoint import new_folder
from esfast.journal import JournalWriter
from esfast.run_folder import RunFolder, alone, read_config, require_free
from esfast.whole_file import write_whole


def test_of_two_runs_that_make_a_folder_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esfast.run_folder.require_free", lambda path: None)  # both saw it free
    RunFolder(tmp_path / "run", {"seed": 1})
    with pytest.raises(ConfigError, match=r"another run's.*--output"):
        RunFolder(tmp_path / "run", {"seed": 2})
    assert read_config(tmp_path / "run") == {"seed": 1}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize("kill", [False, True])
def test_a_run_that_could_not_say_what_it_is_leaves_its_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: bool
) -> None:
    def end(_: int) -> None:
        raise KeyboardInterrupt if kill else OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", end)
        with pytest.raises(KeyboardInterrupt if kill else EsfastError):
            RunFolder(tmp_path / "run", {"seed": 1})
    assert not any((tmp_path / "run").iterdir())
    RunFolder(tmp_path / "run", {"seed": 1})
    assert read_config(tmp_path / "run") == {"seed": 1}


@pytest.mark.parametrize("last_call", ["fsync", "link"])
def test_a_run_killed_before_it_had_its_config_leaves_its_folder_free(
    tmp_path: Path, last_call: str
) -> None:
    child = os.fork()
    if child == 0:
        setattr(os, last_call, lambda *_: os._exit(0))
        RunFolder(tmp_path / "run", {"seed": 1})
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0 and len(list((tmp_path / "run").iterdir())) == 1
    require_free(tmp_path / "run")
    RunFolder(tmp_path / "run", {"seed": 2})
    assert read_config(tmp_path / "run") == {"seed": 2}


def test_a_file_is_synced_whole_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, seen = os.fsync, []

    def synced(descriptor: int) -> None:
        seen.append((os.fstat(descriptor).st_size, (tmp_path / "a").exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    write_whole(tmp_path / "a", b"abc")
    assert seen[0] == (3, False) and len(seen) == 2 and seen[1][1]  # then the folder's entry


def test_a_run_without_a_journal_is_one_process_alone(tmp_path: Path) -> None:
    with (
        alone(tmp_path),
        pytest.raises(StateError, match="another process writes the run"),
        alone(tmp_path),
    ):
        pass
    with alone(tmp_path):
        pass


def test_a_line_that_was_written_twice_over_counts_once(tmp_path: Path) -> None:
    """Killed between the line of metrics.jsonl and the end of what was kept of it, or within."""
    run = RunFolder(tmp_path / "run", {})
    run.pend({"generation": 1})
    (run.path / "metrics.jsonl").write_text('{"generation": 1}\n')
    assert run.pending(1) is None
    (run.path / "metrics.jsonl").write_text('{"generation": 1}')  # and no end of the line
    (run.path / "summary.json").write_text("{}")
    again = RunFolder(tmp_path / "run", {}, changes={}, done=1)
    again.begin()
    assert again.pending(1) == {"generation": 1} and not (run.path / "summary.json").exists()


def test_folders_of_models_that_were_not_saved_whole_go(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", {})
    (run.path / ".model.new-0123").mkdir()
    (run.path / ".model.new-0123" / "model.safetensors").write_bytes(b"half")
    run.snapshots.mkdir()
    (run.snapshots / ".generation-000002.safetensors.tmp").write_bytes(b"half")
    (run.path / ".samples.json.77.tmp").write_bytes(b"half")
    RunFolder(tmp_path / "run", {}, changes={}).begin()
    run.snapshots.rmdir()
    assert [path.name for path in run.path.iterdir()] == ["config.json"]


def test_what_a_process_killed_in_making_its_journal_left_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run", {})
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        JournalWriter.create(run.journal_path, HEADER).close()
    assert len(list(run.path.iterdir())) == 3
    RunFolder(tmp_path / "run", {}, changes={}).begin()
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "journal.esj"]


def test_an_old_model_stays_until_a_new_one_is_there(tmp_path: Path) -> None:
    target, old = tmp_path / "model[1]", tmp_path / ".model[1].old-0123"
    old.mkdir()
    with pytest.raises(RuntimeError), new_folder(target):
        raise RuntimeError("no model")
    assert old.exists() and not target.exists()
    (tmp_path / ".model[1].new-0123").mkdir()  # a killed process's: its room is needed now
    with new_folder(target) as fresh:
        assert {path.name for path in tmp_path.iterdir()} == {old.name, fresh.name}
        (fresh / "x").write_text("a model")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
