"""Rows: a kernel's time beside the limit that binds it and beside its peer; CSV and JSON.

The bandwidth limit is the faster of copy and read-modify-write, of the checksum read. The issue
limit is the rate at which the same noise is made where memory costs next to nothing, the faster of
perturb's and update's. Of the two times that they give, the longer one binds; share_of_limit = that
time / the measured one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from esfast.bench.measure import Timing, peer_of
from esfast.bench.traffic import BUFFER_PASSES, GROUP, drawn, moved, normals
from esfast.bench.workload import (
    BUFFER,
    CACHE,
    CHECKSUM,
    CYCLE,
    EXCHANGE,
    MIRROR,
    TORCH,
    Case,
)
from esfast.errors import DataError
from esfast.whole_file import write_table


@dataclass(frozen=True)
class Stamp:
    """What all rows of one call share. load: the load average before it began."""

    commit: str
    date: str
    device: str
    load: float | None
    threads: int
    table: str


@dataclass(frozen=True)
class Row(Stamp):
    """One kernel. seconds: of a call over `parameters`, the median (of a limit the least); rates
    are a second's; shares: 0 to about 1; None where a figure has no meaning."""

    target: str
    kernel: str
    noise: str
    dtype: str
    memory: str
    population: int
    parameters: int
    seconds: float
    ns_per_parameter: float
    gb_per_s: float | None
    normals_per_s: float | None
    limit: str | None
    share_of_limit: float | None
    share_of_bandwidth: float | None
    share_of_issue: float | None
    times_peer: float | None


COLUMNS = tuple(field.name for field in fields(Row))
KEY = ("device", "threads", "table", "target", "kernel", "noise", "dtype", "memory", "population")
"""Two rows that agree in these are measurements of one thing."""
TORCH_KERNEL = {EXCHANGE: CYCLE, MIRROR: CYCLE}  # what the loops do there; else the same name


class Limits:
    """What the device allows, from the timings of the buffers and of the cached tables."""

    def __init__(self, timings: Sequence[Timing]) -> None:
        self._bytes = {
            t.kernel: moved(t.case, t.kernel) * t.parameters / t.seconds
            for t in timings
            if t.case.memory == BUFFER
        }
        self._draws: dict[tuple[str, str], float] = {}
        for t in timings:
            if t.case.memory == CACHE:
                key, found = (t.case.target, t.case.noise), rate(t, drawn(t.case, t.kernel))
                self._draws[key] = max(found, self._draws.get(key, 0.0))

    def bytes_per_second(self, kernel: str) -> float:
        """The bandwidth that binds a kernel."""
        if kernel == CHECKSUM:
            return self._bytes["read"]
        return max(self._bytes[name] for name in ("copy", "read-modify-write"))

    def draws_per_second(self, case: Case) -> float:
        """The rate at which a case's noise can be made; infinite where there is none."""
        return self._draws.get((case.target, case.noise), float("inf"))

    def seconds(self, timing: Timing) -> dict[str, float]:
        """The least time that each limit allows, by its name."""
        case, kernel = timing.case, timing.kernel
        nbytes, draws = moved(case, kernel) * timing.parameters, drawn(case, kernel)
        out = {"bandwidth": nbytes / self.bytes_per_second(kernel)}
        if draws:
            out["issue"] = draws * timing.parameters / self.draws_per_second(case)
        return out


def rate(timing: Timing, per_parameter: int) -> float:
    """So many a parameter, in a second."""
    return per_parameter * timing.parameters / timing.seconds


def rows_of(timings: Sequence[Timing], stamp: Stamp) -> list[Row]:
    """A row a timing, in their order; all of one dtype and number of threads."""
    limits = Limits(timings)
    peers = {(t.case, t.kernel): t for t in timings if t.case.memory == TORCH}
    return [_row(timing, stamp, limits, peers) for timing in timings]


def _row(
    timing: Timing, stamp: Stamp, limits: Limits, peers: Mapping[tuple[Case, str], Timing]
) -> Row:
    case, kernel = timing.case, timing.kernel
    ns = timing.seconds * 1e9 / timing.parameters
    nbytes, values = moved(case, kernel), normals(case, kernel)
    ours = case.memory not in (BUFFER, CACHE, TORCH)
    least = limits.seconds(timing) if ours else {}
    binding = max(least, key=least.__getitem__) if least else None
    shares = {name: seconds / timing.seconds for name, seconds in least.items()}
    theirs = (peer_of(case), TORCH_KERNEL.get(kernel, kernel))
    peer = peers.get(theirs) if ours or case.memory == TORCH else None
    return Row(
        **asdict(stamp),
        target=case.target,
        kernel=kernel,
        noise=case.noise,
        dtype=case.dtype,
        memory=case.memory,
        population=case.population,
        parameters=timing.parameters,
        seconds=_short(timing.seconds),
        ns_per_parameter=_short(ns),
        gb_per_s=_short(nbytes / ns) if nbytes else None,
        normals_per_s=_short(rate(timing, values)) if values else None,
        limit=binding,
        share_of_limit=_short(shares[binding]) if binding else None,
        share_of_bandwidth=_short(shares["bandwidth"]) if least else None,
        share_of_issue=_short(shares["issue"]) if "issue" in shares else None,
        times_peer=_short(peer.seconds / peer.parameters * 1e9 / ns) if peer else None,
    )


def _short(value: float) -> float:
    """Four digits: more are noise."""
    return float(f"{value:.4g}")


def issue_limits(rows: Iterable[Row]) -> dict[str, float]:
    """The most normals/s that a large population's update can take, by noise."""
    best: dict[str, float] = {}
    for row in rows:
        if row.memory == CACHE and row.normals_per_s:
            shared = GROUP if row.noise == "hadamard" and row.kernel == "perturb" else 1
            best[row.noise] = max(best.get(row.noise, 0.0), shared * row.normals_per_s)
    return best


def bandwidths(rows: Iterable[Row]) -> dict[str, float]:
    """GB/s of the passes over buffers, by name."""
    return {
        row.kernel: row.gb_per_s or 0.0
        for row in rows
        if row.memory == BUFFER and row.kernel in BUFFER_PASSES
    }


# ---- files -------------------------------------------------------------------------------------


def merge_csv(path: Path, fresh: Sequence[Row]) -> None:
    """Replaces the rows of the same key, keeps the others, and writes the file at once.

    Raises DataError where the file holds something else.
    """
    rows = {_key(row): row for row in read_csv(path)}
    rows.update({_key(row): row for row in map(_text, fresh)})
    write_table(path, COLUMNS, (rows[key] for key in sorted(rows, key=_natural)))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file of merge_csv, as text; none where it is not there."""
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), tuple(reader.fieldnames or ())
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}. Give another file with --csv.") from None
    if columns != COLUMNS or any(None in row or None in row.values() for row in rows):
        raise DataError(
            f"{path} is there and is no table of this esfast bench: it has the columns "
            f"{', '.join(columns)[:200] or 'of nothing'}; expected {', '.join(COLUMNS[:4])}, ... "
            f"Give another file with --csv."
        )
    return rows


def record(made: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """What --json holds: how it was made, and the rows."""
    return {"made": made, "rows": [asdict(row) for row in rows]}


def _text(row: Row) -> dict[str, str]:
    return {name: "" if value is None else str(value) for name, value in asdict(row).items()}


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def _natural(key: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    """Numbers by value: 8 before 30."""
    return tuple((int(part) if part.isdecimal() else 0, part) for part in key)
