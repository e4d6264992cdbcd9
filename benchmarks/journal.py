#!/usr/bin/env python
"""Sizes and times of a journal; writes benchmarks/results/journal_cpu.csv.

    python benchmarks/journal.py [--generations 500] [--population 30] [--parameters 10000000]
                                 [--threads N] [--folder DIR]

A run of drawn rewards over random bf16 weights, Gaussian noise, rank shaping, no decay: its file
with rewards, without, and exported; the time of an append (write and sync, in DIR), of reading, of
replaying all of it and of resuming from a snapshot at nine tenths. Replay is bound by the update,
so its time scales with the parameters; ns a parameter and generation say how. `load` is the load
average before it began. What it does not do: wait for a quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.progress import track

from esfast import EvolutionStrategy, ParameterTable
from esfast.journal import export_journal, read_journal
from esfast.provenance import commit, device_name
from esfast.replay import catch_up, keep_journal
from esfast.snapshots import save_snapshot

RESULTS = Path(__file__).parent / "results" / "journal_cpu.csv"


def strategy(args: argparse.Namespace) -> EvolutionStrategy:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(args.parameters, generator=generator).mul_(0.03).bfloat16()
    table = ParameterTable.from_tensors({"weights": weights})
    return EvolutionStrategy(table, population_size=args.population, threads=args.threads)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter()
    result = function()
    return perf_counter() - start, result


def train(args: argparse.Namespace, folder: Path) -> tuple[str, list[float]]:
    """The run's last checksum, and the seconds of each append."""
    es, appends = strategy(args), []
    rng = np.random.default_rng(0)
    with keep_journal(es, folder / "journal.esj") as writer:
        append = writer.append
        writer.append = lambda record: appends.append(timed(lambda: append(record))[0])
        for _ in track(range(args.generations), "training"):
            es.step(rng.normal(size=args.population))
            if es.generation == args.generations * 9 // 10:
                save_snapshot(folder / "snapshots", es.weights, es.generation, writer.chain)
    return es.weights.checksum(), appends


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    expected, appends = train(args, folder)
    path = folder / "journal.esj"
    read_s, journal = timed(lambda: read_journal(path))
    exported = export_journal(journal, folder / "tuned.esj")
    replayed, resumed = strategy(args), strategy(args)
    replay_s, _ = timed(lambda: catch_up(replayed, journal))
    resume_s, _ = timed(lambda: catch_up(resumed, journal, folder / "snapshots"))
    assert replayed.weights.checksum() == resumed.weights.checksum() == expected
    rewards = sum(8 + record.rewards.nbytes for record in journal.generations)
    steps = args.generations * args.parameters
    return {
        "generations": args.generations,
        "population": args.population,
        "parameters": args.parameters,
        "threads": replayed.weights.threads,
        "journal_bytes": path.stat().st_size,
        "without_rewards_bytes": path.stat().st_size - rewards,
        "exported_bytes": exported,
        "weights_bytes": 2 * args.parameters,
        "append_ms": round(1e3 * statistics.median(appends), 3),
        "read_ms": round(1e3 * read_s, 1),
        "replay_s": round(replay_s, 2),
        "resume_from_snapshot_s": round(resume_s, 2),
        "replay_ns_per_parameter_and_generation": round(1e9 * replay_s / steps, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", type=int, default=500)
    parser.add_argument("--population", type=int, default=30)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--folder", default=None, help="where to write; a temporary folder")
    args = parser.parse_args()
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        row = measure(args, Path(folder))
    stamp = {"commit": commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    row = {**stamp, "device": device_name(), "load": load, **row}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        writer.writeheader()
        writer.writerow(row)
    for name, value in row.items():
        print(f"{name:42}{value}")


if __name__ == "__main__":
    main()
