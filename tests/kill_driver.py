"""Runs that are killed: forks a training process, kills it somewhere, and lets the next go on.

    python kill_driver.py FOLDER LIVES SEED [SIZE]

A life is a real process with the real journal, strategy and snapshots, which ends by SIGKILL: by
its own hand in the middle of a write, a sync, an update or a snapshot, or by its parent's at a
random moment. After every SIGKILL the next life continues the journal; a run that gets through is
compared with the undisturbed one, and the next run starts. Goes on until LIVES have been killed,
and a twentieth of that in each way: how many the clock kills depends on the machine. Prints JSON.
Forking spares each life the two seconds that importing torch takes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from esfast import AnchoredDecay, EvolutionStrategy, ParameterTable, state_file
from esfast.journal import JOURNAL, JournalWriter
from esfast.replay import catch_up, header_of
from esfast.snapshots import SNAPSHOTS, save_snapshot

GENERATIONS = 14
KINDS = ("write", "sync", "before update", "after update", "snapshot", "create", "time")


def base(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    shapes = {"a.weight": (size, 17), "b.weight": (61,), "c.weight": (5, 3, 7)}
    made = {n: torch.randn(s, generator=generator) * 0.03 for n, s in shapes.items()}
    return {name: tensor.to(torch.bfloat16) for name, tensor in made.items()}


def make(size: int) -> EvolutionStrategy:
    return EvolutionStrategy(
        ParameterTable.from_tensors(base(size)), sigma=0.02, alpha=0.02, population_size=6,
        antithetic=True, seed=4, decay=AnchoredDecay("l2", 5.0), threads=1,
    )  # fmt: skip


def reward(es: EvolutionStrategy) -> float:
    """Depends on every bit of the weights, and on nothing else: exact in double."""
    tensors = [s.tensor.double() for s in es.weights.table.segments]
    return -float(sum(((t - 0.05) ** 2).sum() for t in tensors))


def train(folder: Path, size: int) -> str:
    """The run from wherever its journal ends; returns the checksum of its weights."""
    es = make(size)
    path = folder / JOURNAL
    if path.exists():
        writer = JournalWriter.resume(path)
        catch_up(es, writer.journal, folder / SNAPSHOTS, note=lambda text: None)
    else:
        writer = JournalWriter.create(path, header_of(es, checksum_every=3))
    es.journal = writer
    while es.generation < GENERATIONS:
        es.step([reward(es) for _ in es.population()])
        if es.generation % 4 == 0:
            save_snapshot(folder / SNAPSHOTS, es.weights, es.generation, writer.chain)
    writer.close()
    return es.weights.checksum()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted(function: Callable, number: int, act: Callable[..., None], after: bool) -> Callable:
    """`function`, whose n-th call is preceded (or followed) by `act`."""
    seen = 0

    def call(*arguments: object, **options: object) -> object:
        nonlocal seen
        seen += 1
        if seen == number and not after:
            act(*arguments)
        result = function(*arguments, **options)
        if seen == number and after:
            act(*arguments)
        return result

    return call


def arm(kind: str, rng: random.Random) -> None:
    """Makes this process kill itself at a random point of `kind`."""
    number = rng.randint(1, 9)
    write = os.write

    def part(descriptor: int, data: bytes) -> None:
        write(descriptor, data[: rng.randrange(len(data))])
        die()

    if kind == "write":
        os.write = counted(os.write, number, part, after=False)
    elif kind == "sync":
        os.fsync = counted(os.fsync, number, lambda *a: die(), after=rng.random() < 0.5)
    elif kind == "snapshot":
        at = rng.choice(["sync", "save_file", "require_disk"])
        wrapped = counted(getattr(state_file, at), rng.randint(1, 2), lambda *a: die(), True)
        setattr(state_file, at, wrapped)
    elif kind == "create":
        os.link = counted(os.link, 1, lambda *a: die(), after=rng.random() < 0.5)
    elif kind.endswith("update"):
        apply = EvolutionStrategy.apply
        EvolutionStrategy.apply = counted(apply, number, lambda *a: die(), kind.startswith("a"))


def life(folder: Path, size: int, kind: str, rng: random.Random) -> bool:
    """One process; True where it was killed. Leaves the checksum of a whole run in `done`."""
    child = os.fork()
    if child == 0:
        try:
            arm(kind, rng)
            (folder / "part").write_text(train(folder, size))
            (folder / "part").rename(folder / "done")  # whole: the clock may strike in a write
        except BaseException as error:
            (folder / "error").write_text(f"{kind}: {type(error).__name__}: {error}")
            os._exit(1)
        os._exit(0)
    if kind == "time":
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def main(folder: Path, lives: int, seed: int, size: int = 40) -> None:
    rng = random.Random(seed)
    torch.set_num_threads(1)
    (folder / "whole").mkdir()
    life(folder / "whole", size, "none", rng)
    expected = (folder / "whole" / "done").read_text()
    killed, wrong, ended, run = dict.fromkeys(KINDS, 0), [], 0, 0
    path = folder / "run-0"
    path.mkdir()
    enough = False
    while not enough or not (path / "done").exists():
        if (path / "done").exists():
            run += 1
            path = folder / f"run-{run}"
            path.mkdir()
        enough = sum(killed.values()) >= lives and min(killed.values()) >= lives // 20
        kind = "none" if enough else rng.choice(KINDS)
        if life(path, size, kind, random.Random(rng.random())):
            killed[kind] += 1
        if (path / "error").exists():
            wrong.append((path / "error").read_text())
            break
        if (path / "done").exists():
            ended += 1
            journals = {(p / JOURNAL).read_bytes() for p in (path, folder / "whole")}
            if (path / "done").read_text() != expected or len(journals) != 1:
                wrong.append(f"run {run} ended with {(path / 'done').read_text()}")
    print(json.dumps({"killed": killed, "wrong": wrong, "runs": ended, "expected": expected}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
