"""The folder of a run: what was asked, what happened, and what came of it.

    config.json         settings, and how the run was made
    metrics.jsonl       a line a generation: rewards, held-out scores, tokens, seconds
    pending.json        such a line while its generation is written down and evaluated
    prompts.jsonl       a line a cycle of esfast fast-slow: the prompts that evolved
    prior.jsonl         a line a prior task and evaluation, with --prior-tasks
    journal.esj         all that moved the weights, synced before they move (docs/journal.md)
    snapshots/          the newest snapshot, which shortens a resume; never required
    samples.json        the same prompts answered before and after
    summary.json        the result; written when all but plots/ is, absent while a run goes on
    plots/              PNG
    model/              the tuned model as a Hugging Face folder

Whole files appear at once (temporary file, fsync, rename). A line that could not be written whole
is taken back, so that a full disk costs no line before it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from esfast.checkpoint import remove_leftovers
from esfast.errors import ConfigError, DataError, EsfastError
from esfast.journal import JOURNAL, JournalWriter
from esfast.snapshots import SNAPSHOTS
from esfast.whole_file import lock, remove_leftover_files, sync, write_whole

CONFIG = "config.json"
METRICS = "metrics.jsonl"
PENDING = "pending.json"
SAMPLES = "samples.json"
SUMMARY = "summary.json"
PLOTS = "plots"
MODEL = "model"
NO_JSON = (ValueError, RecursionError)
"""What `json.loads` raises: the other for a hundred thousand brackets."""
IDENTITY = ("model", "dtype", "task", "settings")
"""What of config.json a journal's header repeats."""


class RunFolder:
    """Writes one run into a folder of its own.

    journal: open, of a run that goes on; None for one that has none yet. changes: what a run that
    goes on changed of its settings. done: generations that one without a journal goes on after.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        changes: Mapping[str, Any] | None = None,
        done: int = 0,
    ) -> None:
        """Makes the folder and its config.json; with `changes`, opens the run that is there, in
        which nothing is changed before `begin`.

        Raises ConfigError where something is there already, EsfastError where it cannot be written;
        of a run that goes on StateError where another process has it, DataError for damage.
        """
        self.path = path
        self.identity = {name: config[name] for name in IDENTITY if name in config}
        self.changes = changes or {}
        self.journal: JournalWriter | None = None
        self.begun = False
        self._config, self._done = config, done
        if changes is None:
            _make(path)
            _claim(path / CONFIG, config)
            self.begun = True
        elif self.journal_path.exists():  # a run may be stopped before its first generation
            self.journal = JournalWriter.resume(self.journal_path)

    def begin(self) -> None:
        """Of a run that goes on, once its model is known to be the one that it started from: says
        so in config.json, and drops the summary and the metrics of generations that were lost."""
        if self.begun:
            return
        self.begun = True
        (self.path / SUMMARY).unlink(missing_ok=True)
        remove_leftovers(self.model)
        remove_leftover_files(self.path, self.snapshots, self.path / PLOTS)
        self._keep_metrics(self._done if self.journal is None else self.journal.generation)
        self.write(CONFIG, self._config)

    def _keep_metrics(self, generations: int) -> None:
        path = self.path / METRICS
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]
            kept = [line for line in whole if _generation_of(line) <= generations]
            write_whole(path, b"".join(kept))

    @property
    def journal_path(self) -> Path:
        """Where the journal is."""
        return self.path / JOURNAL

    @property
    def snapshots(self) -> Path:
        """Where snapshots go."""
        return self.path / SNAPSHOTS

    @property
    def model(self) -> Path:
        """Where the tuned model goes."""
        return self.path / MODEL

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        append_line(self.path / METRICS, record)
        (self.path / PENDING).unlink(missing_ok=True)

    def complete_metrics(self, record: Mapping[str, Any]) -> None:
        """The last line of metrics.jsonl anew, with what it lacked."""
        self.write_lines(METRICS, [*self.lines()[:-1], record])

    def pend(self, record: Mapping[str, Any]) -> None:
        """Keeps a line of metrics.jsonl before its generation is in the journal, for a run that is
        stopped before it is written."""
        self.write(PENDING, record)

    def pending(self, generation: int) -> dict[str, Any] | None:
        """What was last kept by `pend`, where it is of that generation, and metrics.jsonl has not
        come to it."""
        lines = self.lines()
        if not (self.path / PENDING).exists() or (lines and lines[-1]["generation"] >= generation):
            return None
        kept: dict[str, Any] = read_json(self.path / PENDING)
        return kept if kept.get("generation") == generation else None

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far."""
        path = self.path / METRICS
        return list(read_lines(path)) if path.exists() else []

    def write(self, name: str, content: Any) -> None:
        """The JSON file `name`, replaced at once."""
        write_whole(self.path / name, _json(content, indent=1) + b"\n")

    def write_lines(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """The JSONL file `name`, replaced at once."""
        write_whole(self.path / name, b"".join(_json(record) + b"\n" for record in records))


def _make(path: Path) -> None:
    require_free(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {path}: {error.strerror or error}; give another one with "
            "--output."
        ) from None


def _claim(config: Path, content: Mapping[str, Any]) -> None:
    """A new run's alone: of two that make one folder at the same moment, one is refused. There with
    all of it or not at all: an empty one could neither go on nor be begun anew."""
    own = config.with_name(f".{config.name}.{uuid4().hex[:12]}.tmp")
    try:
        write_whole(own, _json(content, indent=1) + b"\n")
        os.link(own, config)  # unlike a rename it never replaces one
        sync(config.parent)
    except FileExistsError:
        raise ConfigError(
            f"{config.parent} has just become another run's; give another folder with --output."
        ) from None
    except OSError as error:
        raise _unwritable(config, error) from None
    finally:
        own.unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keeps other processes out of a run's folder that has no journal, whose lock would: StateError
    where one is in. File systems without locks on folders (NFS) are left unguarded."""
    folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            lock(folder, f"the run '{path}'")
        yield
    finally:
        os.close(folder)


def require_journal(path: Path) -> None:
    """DataError for a run that got somewhere and has no journal to go on from."""
    got = [name for name in (METRICS, MODEL) if (path / name).exists()]
    if got and not (path / JOURNAL).exists():
        raise DataError(
            f"{path} has {' and '.join(got)} but no {JOURNAL}, so its weights cannot be made again "
            "and it cannot go on. Put the journal back, or start a new run."
        )


def folder_for(output: str | None, name: str) -> Path:
    """The folder that --output names; without it one of this moment, runs/NAME-TIME."""
    if output is not None:
        return Path(output)
    return Path("runs") / f"{name.replace(':', '-')}-{datetime.now():%Y%m%d-%H%M%S}"


def require_free(path: Path) -> None:
    """Raises ConfigError where `path` is something other than an empty folder, or one of a run that
    was killed before it had its config.json."""
    begun = f"*.{CONFIG}.*.tmp"  # of _claim, and of the file that it writes aside
    if path.exists() and (not path.is_dir() or any(not p.match(begun) for p in path.iterdir())):
        raise ConfigError(f"{path} is there already; give another folder with --output.")


def _json(content: Any, indent: int | None = None) -> bytes:
    r"""UTF-8; half a surrogate pair, which a model or a file name may hold, as JSON's \ud83d."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a JSON line and syncs it. Raises EsfastError with the file as it was before."""
    line = _json(record) + b"\n"
    try:
        with path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) != len(line):
                    raise OSError("only a part of the line could be written")
                os.fsync(file.fileno())
            except BaseException:
                with suppress(OSError):  # the first error is the one to tell
                    file.truncate(before)
                raise
    except OSError as error:
        raise _unwritable(path, error) from None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file. Raises DataError for one that is missing or damaged."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged ({error}).") from None
    for number, line in enumerate(text.split("\n"), start=1):  # U+2028 ends a line to splitlines
        if not line:
            continue
        try:
            yield _of_kind(json.loads(line), dict)
        except NO_JSON as error:
            raise DataError(f"{path} line {number} is damaged ({error}).") from None


def read_config(folder: Path) -> dict[str, Any]:
    """A run's config.json. Raises DataError where `folder` is no run."""
    config: dict[str, Any] = read_json(folder / CONFIG)
    return config


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON file of a run, which holds an object or a list (`kind`). Raises DataError for one that
    is missing or damaged."""
    try:
        return _of_kind(json.loads(path.read_text(encoding="utf-8")), kind)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
    except NO_JSON as error:
        raise DataError(f"{path} is damaged ({error}).") from None


def _of_kind(content: Any, kind: type) -> Any:
    if not isinstance(content, kind):
        raise ValueError(f"it holds {json.dumps(content)[:60]}, which is no {kind.__name__}")
    return content


def _generation_of(line: bytes) -> float:
    """A metrics line's generation; infinite for a damaged one, which a resumed run drops."""
    try:
        return float(json.loads(line)["generation"])
    except (*NO_JSON, KeyError, TypeError):
        return math.inf


def _unwritable(path: Path, error: OSError) -> EsfastError:
    return EsfastError(
        f"cannot write {path}: {error.strerror or error}. What was written before is whole; free "
        "some space or choose another folder with --output."
    )
