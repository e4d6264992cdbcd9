"""What the machine has: cores, and whether memory and disk suffice, asked before they are taken.

Linux: MemAvailable of /proc/meminfo (man 5 proc), and below it what the process's control group may
still take (memory.max - memory.current + the file cache it can drop; cgroup v2). Elsewhere free
memory is unknown, and nothing is refused. The answer is a moment's: it reserves nothing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from esfast.errors import EsfastError

GROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that this process may still take without swapping; None where that is unknown."""
    system = proc_bytes(Path("/proc/meminfo"), "MemAvailable")
    group = _group_room(GROUPS)
    known = [room for room in (system, group) if room is not None]
    return min(known, default=None)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def require_memory(needed: int, purpose: str, mend: str) -> None:
    """Raises EsfastError, with both numbers, where fewer than `needed` bytes are available."""
    room = available_memory()
    if room is not None and room < needed:
        raise EsfastError(
            f"{purpose} needs about {readable(needed)} of memory, and {readable(room)} are "
            f"available. {mend}"
        )


def require_disk(folder: Path, needed: int, purpose: str) -> None:
    """Raises EsfastError where `folder` (or its nearest parent that exists) has too little room."""
    there, room = free_disk(folder)
    if room < needed:
        raise EsfastError(
            f"{purpose} needs about {readable(needed)} of disk, and {there} has {readable(room)} "
            f"left. Free some, or name a folder on another disk."
        )


def free_disk(folder: Path) -> tuple[Path, int]:
    """`folder` or its nearest parent that exists, and the bytes that this user may still write
    there."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return there, shutil.disk_usage(there).free


def readable(count: int) -> str:
    """Bytes as text: 1.5 GB, 269 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def proc_bytes(path: Path, field: str) -> int | None:
    """A field of a file of /proc (man 5 proc) that is in kB; None where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{field}:")), None)


def _group_room(groups: Path) -> int | None:
    """What this process's control group may still take; None without a limit."""
    try:
        paths = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line[3:] for line in paths if line.startswith("0::"))
        group = groups / own.lstrip("/")
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        used = int((group / "memory.current").read_text())
        stat = (group / "memory.stat").read_text().splitlines()
    except (OSError, StopIteration, ValueError):
        return None
    droppable = sum(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
    return max(0, limit - used + droppable)
