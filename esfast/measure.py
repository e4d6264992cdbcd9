"""Where a run's time and memory go.

Time: laps between two readings of the monotonic clock, each put to one name. Memory: the peak
resident set of this process (Linux resets the mark for the asking; elsewhere the peak since the
start is all there is), and on CUDA the peak of the allocator.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from esfast.resources import proc_bytes

GENERATION = "generation"
SCORING = "scoring"
PERTURB = "perturb and restore"
UPDATE = "update"
RECORDS = "records"
SETUP = "setup"
FINISH = "finish"
PRIOR_TASKS = "prior tasks"
PROMPT_SEARCH = "prompt search"
OPTIMISATION = "optimisation"
EVALUATION = "evaluation"

INSIDE = (GENERATION, SCORING, EVALUATION)
LOOP = (*INSIDE, PERTURB, UPDATE, OPTIMISATION, RECORDS)


class Clock:
    """Laps: every second since the start belongs to exactly one name."""

    def __init__(self, earlier: float = 0.0) -> None:
        """Starts now; `earlier` seconds before that are counted as setup."""
        self.seconds: dict[str, float] = defaultdict(float)
        if earlier > 0:
            self.seconds[SETUP] = earlier
        self._last = time.perf_counter()

    def go_on(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Adds the seconds of an earlier part of the run, from its metrics lines."""
        for name, seconds in (lines[-1].get("total_seconds", {}) if lines else {}).items():
            self.seconds[name] += seconds

    def lap(self, name: str) -> float:
        """Puts the time since the last lap to `name`; returns it in seconds."""
        now = time.perf_counter()
        spent = now - self._last
        self._last = now
        self.seconds[name] += spent
        return spent

    def share(self, parts: Mapping[str, float]) -> float:
        """Puts the time since the last lap to several names, in the proportion of `parts`; returns
        it. What waits for others says so what they did meanwhile."""
        now = time.perf_counter()
        spent, whole = now - self._last, sum(parts.values())
        self._last = now
        for name, part in parts.items():
            self.seconds[name] += spent * (part / whole if whole else 1 / len(parts))
        return spent

    def move(self, names: Sequence[str], to: str, since: Mapping[str, float]) -> None:
        """Puts what `names` have gained over the earlier reading `since` to `to` instead."""
        for name in names:
            was = since.get(name, 0.0)
            self.seconds[to] += self.seconds[name] - was
            self.seconds[name] = was

    def outside_share(self, names: tuple[str, ...] = LOOP) -> float:
        """The share of the time of `names` that was neither generation nor scoring; 0 to 1."""
        spent = {name: self.seconds.get(name, 0.0) for name in names}
        total = sum(spent.values())
        inside = sum(spent[name] for name in names if name in INSIDE)
        return 1.0 - inside / total if total > 0 else 0.0


def reset_peak() -> bool:
    """Forget the peaks so far; False where this system does not let a process do so."""
    if _cuda_is_used():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM
    except OSError:
        return False
    return True


def _cuda_is_used() -> bool:
    """Asking for its memory would make a context otherwise, after which no fork can use a GPU."""
    initialized: Any = torch.cuda.is_initialized
    return bool(initialized())


def peak_bytes() -> int:
    """The peak resident set since the last reset (or the start), plus the CUDA allocator's peak."""
    peak = proc_bytes(Path("/proc/self/status"), "VmHWM")
    if peak is None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if _cuda_is_used():
        peak += torch.cuda.max_memory_allocated()
    return peak
