"""A file that appears at once or not at all: a temporary one beside it, fsync, rename, fsync of the
folder's entry. And the lock of one that is written for as long as a run takes."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from esfast.errors import EsfastError, StateError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """`path`, open for writing; replaced when the block ends, left as it was where it raises.

    Raises EsfastError where the file cannot be written, or where `path` is something else than a
    file: root could rename one over /dev/null.
    """
    if not path.name or (path.exists() and not path.is_file()):
        raise EsfastError(
            f"cannot write '{path}': it is there and is no file. Name a file, new or to be "
            "replaced, in a folder that is there."
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise EsfastError(
            f"cannot write {path}: {error.strerror or error}. Free some space, or name another "
            f"file in a folder that is there."
        ) from None


def write_whole(path: Path, data: bytes) -> None:
    """`path` with this content; errors as of `whole_file`."""
    with whole_file(path) as file:
        file.write(data)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """`path` as CSV, its columns named; errors as of `whole_file`."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_whole(path, text.getvalue().encode())


def remove_leftover_files(*folders: Path) -> None:
    """What processes that were killed had of files that never appeared in these folders."""
    for left in [left for folder in folders for left in folder.glob(".*.tmp")]:
        left.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """A file's content, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int, what: str) -> None:
    """Until it is closed. StateError, naming `what`, where another process, or another descriptor
    of this one, has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StateError(
            f"another process writes {what} (or this one does, elsewhere); wait for it or stop it "
            "first."
        ) from None


_OURS: weakref.WeakSet[Any] = weakref.WeakSet()


def leave_to_parent(writer: Any) -> None:
    """Closes `writer` in every fork of this process, which would write over what its parent writes,
    and keep the lock of one that was killed."""
    _OURS.add(writer)


def _close_in_fork() -> None:
    for writer in list(_OURS):
        writer.close()


os.register_at_fork(after_in_child=_close_in_fork)
