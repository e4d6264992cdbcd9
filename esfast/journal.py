"""A run's journal: a file that holds all that ever moved the weights, written before they move.

    journal = JournalWriter.create(path, header)
    journal.append(record)              # on disk when it returns: now the weights may move
    read_journal(path).generations      # with the base, these are the run

A record that a kill or a full disk left incomplete at the end is dropped when it is read, and cut
off when the journal is continued; any other damage raises DataError and names the record. One
process writes at a time (flock). `export_journal` makes one compressed file of it, to send around.
"""

from __future__ import annotations

import os
import struct
import weakref
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

from esfast.errors import ConfigError, DataError, EsfastError, StateError
from esfast.home_folders import at_home
from esfast.journal_format import (
    CHECK_BYTES,
    HEAD,
    HEAD_CHECK_BYTES,
    GenerationRecord,
    JournalHeader,
    Record,
    SegmentRecord,
    check_of,
    decode,
    decode_header,
    encode,
    encode_header,
    seal,
)
from esfast.whole_file import leave_to_parent, lock, sync, write_whole

JOURNAL = "journal.esj"  # its name in a run's folder
EXPORT_MAGIC = b"\x89ESZ\r\n\x1a\n"
_EXPORT = struct.Struct("<8sHQ16s")  # magic, version, bytes of the journal, check of what follows
EXPORT_VERSION = 1
LARGEST_JOURNAL = 1 << 32  # bytes that an exported journal may unpack to


@dataclass(frozen=True)
class Journal:
    """A journal as it was read.

    chains: the check value after the header and after each record; whole_bytes: the length without
    a torn end; torn: what was dropped, in words, or None.
    """

    header: JournalHeader
    records: tuple[Record, ...]
    chains: tuple[bytes, ...]
    whole_bytes: int
    torn: str | None = None

    @property
    def generations(self) -> tuple[GenerationRecord, ...]:
        """The updates, in order; number n is generation n's."""
        return tuple(record for record in self.records if isinstance(record, GenerationRecord))

    def chain_at(self, generation: int) -> str:
        """The check value, in hex, once `generation` generations are recorded."""
        at = 0
        for number, record in enumerate(self.records, start=1):
            if isinstance(record, GenerationRecord) and record.generation < generation:
                at = number
        return self.chains[at].hex()


def journal_path(run: str | Path) -> Path:
    """The journal of a run's folder, or the file itself. DataError for a name no file has."""
    path = at_home(run)
    try:
        return path / JOURNAL if path.is_dir() else path
    except OSError as error:  # of 256 letters, for one
        why = error.strerror or error
        raise DataError(f"no journal can be '{path}': {why}. Name another file.") from None


def read_journal(run: str | Path) -> Journal:
    """The whole journal of a run's folder, of a journal file or of an exported one.

    Raises DataError for a file that is missing, damaged or of another version.
    """
    path = journal_path(run)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the journal '{path}' ({error.strerror or error}); give a run's folder, "
            f"its {JOURNAL}, or an exported adapter."
        ) from None
    return parse(_unpacked(data, str(path)), str(path))


def parse(data: bytes, where: str) -> Journal:
    """A journal from its bytes; `where` names it in errors."""
    header, at = decode_header(data, where)
    records: list[Record] = []
    chains = [data[at - CHECK_BYTES : at]]
    generation = 0
    while at < len(data):
        name = f"'{where}': record {len(records)} (at byte {at}, generation {generation})"
        end = _record_end(data, at, chains[-1], name)
        if end is None:
            torn = f"{name} was never written whole; its {len(data) - at} bytes are dropped."
            return Journal(header, tuple(records), tuple(chains), at, torn)
        record = _decoded(data[at:end], header, name)
        generation = _check_order(record, generation, name)
        records.append(record)
        chains.append(data[end - CHECK_BYTES : end])
        at = end
    return Journal(header, tuple(records), tuple(chains), at)


def _record_end(data: bytes, at: int, chain: bytes, name: str) -> int | None:
    """Where the record at `at` ends; None for a torn one, the file's last."""
    start = at + HEAD.size + HEAD_CHECK_BYTES
    if start > len(data) or not any(data[at:]):  # a file system may have left zeros
        return None
    head = data[at : at + HEAD.size]
    if data[at + HEAD.size : start] != check_of(chain, head, HEAD_CHECK_BYTES):
        raise _damaged(name, "its head does not fit what comes before it")
    length, _ = HEAD.unpack(head)
    end = start + int(length) + CHECK_BYTES
    check = data[end - CHECK_BYTES : end]
    if end > len(data) or (end == len(data) and not any(check)):
        return None
    if check != check_of(chain, head + data[start : end - CHECK_BYTES]):
        raise _damaged(name, "its check value does not fit its content")
    return end


def _decoded(record: bytes, header: JournalHeader, name: str) -> Record:
    _, kind = HEAD.unpack_from(record)
    payload = record[HEAD.size + HEAD_CHECK_BYTES : -CHECK_BYTES]
    try:
        return decode(kind, payload, header.config)
    except (ValueError, IndexError, RecursionError) as error:
        raise _damaged(name, f"it holds what no journal does: {error}") from None


def _check_order(record: Record, generation: int, name: str) -> int:
    """How many generations there are after `record`."""
    if record.generation != generation:
        what = f"it is of generation {record.generation}: records miss or are swapped"
        raise _damaged(name, what)
    return generation + isinstance(record, GenerationRecord)


def _damaged(name: str, what: str) -> DataError:
    return DataError(
        f"{name} is damaged: {what}. Nothing after it can be trusted; take another copy."
    )


@dataclass(frozen=True)
class _Tip:
    """Where a journal ends: one object, so that an interrupt finds the old end or the new one."""

    chain: bytes
    end: int  # bytes
    generation: int
    generation_chain: str

    def after(self, record: Record, data: bytes, chain: bytes) -> _Tip:
        grown = _Tip(chain, self.end + len(data), self.generation, self.generation_chain)
        if not isinstance(record, GenerationRecord):
            return grown
        return replace(grown, generation=self.generation + 1, generation_chain=chain.hex())


class JournalWriter:
    """Appends records; the only one who may. Make one with `create` or `resume`.

    path: of the file; journal: what it held when it was opened; header: its header.
    """

    def __init__(self, path: Path, descriptor: int, journal: Journal) -> None:
        self.path = path
        self.journal = journal
        self.header = journal.header
        self._descriptor: int | None = descriptor
        # A notebook's cell that is run again takes up the journal that it left without a close.
        self._release = weakref.finalize(self, os.close, descriptor)
        self._release.atexit = False  # the process's end does it
        leave_to_parent(self)
        done = len(journal.generations)
        self._tip = _Tip(journal.chains[-1], journal.whole_bytes, done, journal.chain_at(done))

    @classmethod
    def create(cls, path: str | Path, header: JournalHeader) -> JournalWriter:
        """A new journal: there with its whole header, or not at all.

        Raises ConfigError where the file is there already, EsfastError where it cannot be written.
        """
        path = Path(path)
        data = encode_header(header)
        journal = parse(data, str(path))
        temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")
        descriptor = _open(temporary, os.O_CREAT | os.O_EXCL, path)
        try:
            lock(descriptor, f"the journal '{path}'")
            _write(descriptor, data)
            os.fsync(descriptor)
            os.link(temporary, path)  # unlike a rename it never replaces one
            sync(path.parent)
        except FileExistsError:
            os.close(descriptor)
            raise ConfigError(
                f"the journal '{path}' is there already; continue it, or choose another place."
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise _unwritable(path, error) from None
        finally:
            temporary.unlink(missing_ok=True)
        return cls(path, descriptor, journal)

    @classmethod
    def resume(cls, run: str | Path) -> JournalWriter:
        """A journal to be continued; a torn record at its end is cut off (`journal.torn` tells).

        Raises StateError where another process writes it, DataError as `read_journal` does.
        """
        path = journal_path(run)
        descriptor = _open(path, 0, path)
        try:
            lock(descriptor, f"the journal '{path}'")
            data = path.read_bytes()
            if data.startswith(EXPORT_MAGIC):
                raise DataError(
                    f"'{path}' is an exported journal, which is replayed and not continued; name "
                    f"the run's own {JOURNAL}."
                )
            journal = parse(data, str(path))
            os.ftruncate(descriptor, journal.whole_bytes)
            os.fsync(descriptor)  # a killed writer may have left its last record unsynced
        except OSError as error:
            os.close(descriptor)
            raise _unwritable(path, error) from None
        except EsfastError:
            os.close(descriptor)
            raise
        return cls(path, descriptor, journal)

    @property
    def generation(self) -> int:
        """How many generations are recorded."""
        return self._tip.generation

    def append(self, record: Record) -> None:
        """On disk when this returns; raises EsfastError with the journal as it was before.

        A record of another generation than the next one is refused (StateError).
        """
        if self._descriptor is None:
            raise StateError(f"the journal '{self.path}' is closed; continue it to append to it.")
        if record.generation != self._tip.generation:
            raise StateError(
                f"the journal '{self.path}' is at generation {self._tip.generation}, and a record "
                f"of {record.generation} was to be appended: the run and its journal are apart (an "
                "interrupt may have come between the two). Make the run anew from its base and let "
                "it go on from the journal."
            )
        try:
            kind, payload = encode(record)
            decode(kind, payload, self.header.config)
        except (ValueError, struct.error) as error:
            raise StateError(
                f"generation {record.generation} cannot be recorded, and was not: {error}."
            ) from None
        data, chain = seal(self._tip.chain, kind, payload)
        try:
            self._cut()  # what an interrupt left behind a record that was never told to be written
            _write(self._descriptor, data)
            os.fsync(self._descriptor)
        except BaseException as error:
            with suppress(OSError):  # else a torn end, which the next append or `resume` cuts off
                self._cut()
            if isinstance(error, OSError):
                raise _unwritable(self.path, error) from None
            raise
        self._tip = self._tip.after(record, data, chain)

    def _cut(self) -> None:
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, self._tip.end)
        os.lseek(self._descriptor, self._tip.end, os.SEEK_SET)

    @property
    def chain(self) -> str:
        """The check value, in hex, after the last generation's record: `Journal.chain_at` there."""
        return self._tip.generation_chain

    def close(self) -> None:
        """Gives the lock up; twice does no harm."""
        self._descriptor = None
        self._release()

    def __reduce__(self) -> NoReturn:
        raise StateError(
            f"the writer of '{self.path}' holds an open file, and cannot be copied or pickled; "
            "continue the journal with JournalWriter.resume where it is to be written."
        )

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def export_journal(journal: Journal, path: str | Path, run: Mapping[str, Any] | None = None) -> int:
    """Writes the updates alone as one compressed file: no rewards, and of the run only `run`.

    It holds what `read_journal` takes and what leads to the same weights. Replaces `path` at once;
    returns its size in bytes. Raises EsfastError where it cannot be written.
    """
    header = encode_header(replace(journal.header, run=run or {}))
    plain = _sealed(header, (r for r in journal.records if not isinstance(r, SegmentRecord)))
    packed = zlib.compress(plain, 9)
    data = (
        _EXPORT.pack(EXPORT_MAGIC, EXPORT_VERSION, len(plain), check_of(b"", packed, 16)) + packed
    )
    write_whole(Path(path), data)
    return len(data)


def _sealed(header: bytes, records: Iterable[Record]) -> bytes:
    parts, chain = [header], header[-CHECK_BYTES:]
    for record in records:
        if isinstance(record, GenerationRecord):
            record = replace(record, rewards=None)
        data, chain = seal(chain, *encode(record))
        parts.append(data)
    return b"".join(parts)


def _unpacked(data: bytes, where: str) -> bytes:
    """The journal inside an exported file; any other data as it is."""
    if not data.startswith(EXPORT_MAGIC):
        return data
    damaged = DataError(
        f"'{where}': the compressed records of this exported journal are damaged or cut off; take "
        "another copy of the file."
    )
    if len(data) < _EXPORT.size:
        raise damaged
    _, version, length, digest = _EXPORT.unpack_from(data)
    if version != EXPORT_VERSION:
        raise DataError(
            f"'{where}' is an exported journal of version {version}, and this esfast knows "
            f"{EXPORT_VERSION}; use the esfast that wrote it (or its header is damaged)."
        )
    if length > LARGEST_JOURNAL:
        raise damaged
    packed = data[_EXPORT.size :]
    if check_of(b"", packed, 16) != digest:
        raise damaged
    try:
        plain = zlib.decompressobj().decompress(packed, length + 1)
    except zlib.error:
        raise damaged from None
    if len(plain) != length:
        raise damaged
    return plain


def _open(path: Path, flags: int, journal: Path) -> int:
    """`path`, which `journal` is or will be: errors name that one."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o666)
    except FileNotFoundError:
        if flags:
            raise _unwritable(journal, FileNotFoundError(2, "no such folder")) from None
        raise DataError(f"there is no journal '{journal}'; name the folder of a run.") from None
    except OSError as error:
        raise _unwritable(journal, error) from None


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _unwritable(path: Path, error: OSError) -> EsfastError:
    return EsfastError(
        f"cannot write '{path}': {error.strerror or error}. What was written before is whole; free "
        "some space or choose another folder."
    )
