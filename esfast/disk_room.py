"""Whether the disk holds what a run will write, asked before the run's folder is made.

Counted are the tuned model, which is written beside what it replaces, and the large files of which
the newest few are kept (ES's snapshots, GRPO's checkpoints): a new one is written before the oldest
goes, so one more than are kept lie there at once. What an earlier part of the run left is on the
disk already, and counts where it makes room. Journal, metrics and pictures are not counted, nor are
files of others: what is refused here could not have ended well, what is not may still fill it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esfast.checkpoint import SMALL_FILES
from esfast.engines.base import Engine
from esfast.engines.fleet import Fleet
from esfast.errors import EsfastError
from esfast.grpo import CHECKPOINTS, GrpoConfig
from esfast.grpo_trl import KEPT
from esfast.journal import JOURNAL, read_journal
from esfast.resources import free_disk, readable
from esfast.rollout import TrainConfig
from esfast.snapshots import SNAPSHOTS

MOMENTS = 2  # AdamW's, of the weights' dtype: a checkpoint of SmolLM2 in fp32 has 3 times 538 MB


@dataclass(frozen=True)
class Rolling:
    """Large files of a run, of which the `kept` newest stay.

    what: one of them in a word; flag: which says how often; each: bytes; count: how many are still
    to be written; there: bytes of those on the disk, oldest first.
    """

    what: str
    flag: str
    each: int
    count: int
    kept: int
    there: tuple[int, ...] = ()

    def taken(self) -> tuple[int, int]:
        """Bytes beyond those there: at most, and in the end (below 0 where more went than came)."""
        there, now, most = list(self.there), 0, 0
        for _ in range(min(self.count, len(there) + self.kept + 1)):  # then it goes on like that
            now += self.each
            most = max(most, now)
            there.append(self.each)
            while len(there) > self.kept:
                now -= there.pop(0)
        return most, now

    def told(self) -> str:
        """What lies there at once, and what changes that."""
        most = min(self.count + len(self.there), self.kept + 1)
        what = f"a {self.what}" if most == 1 else f"up to {most} {self.what}s at once, each"
        return f"{what} of {readable(self.each)} ({self.flag})"


def require_disk_for(
    folder: Path, model: int, rolling: Rolling, mends: Sequence[str], models: int = 1
) -> None:
    """EsfastError where a run of `folder` clearly does not fit its disk.

    model: bytes of the tuned weights; mends: what the user may do beside freeing some, in words;
    models: tuned models that stay, this run's and those of the stages after it.
    """
    most, kept = rolling.taken()
    needed = max(most, kept + models * model + SMALL_FILES)  # the last save asks for the latter
    there, room = free_disk(folder)
    if room >= needed:
        return
    whose = "the tuned model" if models == 1 else f"each of {models} tuned models"
    parts = [f"{readable(model)} for {whose} and {readable(SMALL_FILES)} for its small files"]
    mend = ["Free some", *mends]
    if rolling.count:
        parts.append(rolling.told())
        mend.append(f"write no {rolling.what}s ({rolling.flag} 0)")
    raise EsfastError(
        f"the run in {folder} needs about {readable(needed)} of disk ({', '.join(parts)}), and "
        f"{there} has {readable(room)} left. {', '.join(mend[:-1])}, or {mend[-1]}."
    )


def require_disk_for_train(
    engine: Engine, config: TrainConfig, folder: Path, resumed: bool, models: int = 1
) -> None:
    """`require_disk_for` an ES run. One on a fleet, whose engines may have other disks, is not
    asked."""
    if isinstance(engine, Fleet):
        return
    model, elements = _weights(engine)
    each = 4 * elements if config.memory == "master" else model
    snapshots = snapshots_of(config, each, folder, resumed)
    require_disk_for(folder, model, snapshots, _mends(resumed), models)


def snapshots_of(config: TrainConfig, each: int, folder: Path, resumed: bool) -> Rolling:
    """The snapshots that a run will write, after those of its earlier part."""
    every, done = config.snapshot_every, 0
    if every and resumed and (folder / JOURNAL).exists():
        done = len(read_journal(folder).generations)
    count = max(config.generations // every - done // every, 0) if every else 0
    there = _sizes(folder / SNAPSHOTS) if resumed else ()
    return Rolling("snapshot", "--snapshot-every", each, count, 1, there)


def require_disk_for_grpo(
    engine: Engine, config: GrpoConfig, folder: Path, done: int, resumed: bool
) -> None:
    """`require_disk_for` a GRPO run that goes on after generation `done`. TRL writes a checkpoint
    at the end too, wherever that falls."""
    model, _ = _weights(engine)
    every, left = config.checkpoint_every, config.generations - done
    count = 0
    if every and left > 0:
        count = config.generations // every - done // every + (config.generations % every > 0)
    there = _sizes(folder / CHECKPOINTS) if resumed else ()
    each = (1 + MOMENTS) * model
    rolling = Rolling("checkpoint", "--checkpoint-every", each, count, KEPT, there)
    require_disk_for(folder, model, rolling, _mends(resumed))


def _mends(resumed: bool) -> list[str]:
    if resumed:
        return ["move the run's folder to another disk"]
    return ["name another disk with --output", "choose a smaller model or a narrower --dtype"]


def _weights(engine: Engine) -> tuple[int, int]:
    """Bytes and elements of the weights that an engine generates with."""
    specs = engine.live_weights().specs()
    return sum(spec.nbytes for spec in specs), sum(spec.elements for spec in specs)


def _sizes(folder: Path) -> tuple[int, ...]:
    """Bytes of each file or folder there, the oldest first."""
    found = [path for path in folder.glob("*") if not path.name.startswith(".")]
    found.sort(key=lambda path: path.stat().st_mtime)
    return tuple(
        sum(one.stat().st_size for one in (path, *path.rglob("*")) if one.is_file())
        for path in found
    )
