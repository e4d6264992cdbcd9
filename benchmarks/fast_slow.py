#!/usr/bin/env python
"""Prompts and weights against weights alone: benchmarks/results/fast_slow_cpu.csv and .png.

    python benchmarks/fast_slow.py [--work DIR] [--seeds 1 2] [--jobs 2]

SmolLM2-135M-Instruct, the default task, bf16, one thread a run; a run is a command of esfast in
DIR/KEY (`ARMS`), and one that is there is gone on with. Tokens are all that training and the search
read and generated, evaluation left out; a row is one evaluation of 96 held-out prompts under one
instruction. Tokens and scores repeat to the bit, seconds are not measured. It took 28 minutes on
two cores with other work on them.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from esfast.fast_slow.cycles import HELD_OUT_PROMPT, read_cycles
from esfast.plots import legend_below, picture
from esfast.provenance import commit, device_name
from esfast.run_folder import CONFIG, METRICS, SUMMARY, read_json, read_lines

RESULTS = Path(__file__).parent / "results" / "fast_slow_cpu.csv"
THREADS = 1
SHARED = ("--population-size", "8", "--prompts", "32", "--eval-every", "2",
          "--threads", str(THREADS), "--shaping", "group_centered")  # fmt: skip
ARMS = {
    "fast-slow": (
        "fast-slow", "--cycles", "2", "--generations-per-cycle", "3",
        "--metric-calls", "120", "--pareto-size", "24",
    ),
    "weights": ("train", "--generations", "10"),
}  # fmt: skip
CURVES = {
    ("weights", "first"): ("weights alone", "#27465f", "-"),
    ("fast-slow", "first"): ("fast-slow, first instruction", "#c4572e", "-"),
    ("fast-slow", "best"): ("fast-slow, best prompt", "#c4572e", "--"),
}
Row = dict[str, Any]


def run(arm: str, seed: int, folder: Path) -> list[Row]:
    """One run, begun or gone on with unless it is over; its rows."""
    summary = folder / SUMMARY
    if not (summary.exists() and read_json(summary)["status"] == "finished"):
        command, *flags = ARMS[arm]
        begin = (*flags, *SHARED, "--seed", str(seed), "--output", str(folder))
        arguments = ("--resume", str(folder)) if (folder / CONFIG).exists() else begin
        with folder.with_suffix(".log").open("ab") as log:
            subprocess.run(
                [sys.executable, "-m", "esfast", command, *arguments],
                stdout=log, stderr=log, check=True, env={**os.environ, "COLUMNS": "120"},
            )  # fmt: skip
    return [{"arm": arm, "seed": seed, **row} for row in rows(folder)]


def rows(folder: Path) -> Iterator[Row]:
    """A row an evaluation, in the order of the run."""
    yield row(read_json(folder / SUMMARY)["held_out_before"], "first", "before", 0, 0)
    cycles, searched = read_cycles(folder), 0
    for line in [None, *read_lines(folder / METRICS)]:
        generation = 0 if line is None else line["generation"]
        training = 0 if line is None else total(line["cost"]["training"])
        for name, instruction in (("held_out", "first"), (HELD_OUT_PROMPT, "best")):
            if line is not None and line.get(name):
                yield row(line[name], instruction, "generation", training, searched)
        for cycle in cycles:
            if cycle.generation == generation and cycle.held_out:
                searched += cycle.tokens.prompt + cycle.tokens.generated
                yield row(cycle.held_out, "best", "search", training, searched)


def row(
    held_out: Mapping[str, Any], instruction: str, after: str, training: int, search: int
) -> Row:
    low, high = held_out["score_95"]
    return {
        "generation": held_out["generation"],
        "after": after,
        "instruction": instruction,
        "score": round(held_out["score"], 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "training_tokens": training,
        "search_tokens": search,
    }


def total(tokens: Mapping[str, int]) -> int:
    return tokens["prompt"] + tokens["generated"]


def measure(work: Path, seeds: Sequence[int], jobs: int) -> list[Row]:
    """The rows of all runs, arm by arm."""
    keys = [(arm, seed) for arm in ARMS for seed in seeds]
    with Progress() as progress, ThreadPoolExecutor(jobs) as pool:
        bar = progress.add_task("runs", total=len(keys))

        def one(key: tuple[str, int]) -> list[Row]:
            made = run(*key, work / f"{key[0]}-seed{key[1]}")
            progress.console.print(f"{key[0]}, seed {key[1]}: {made[-1]['score']}")
            progress.advance(bar)
            return made

        return [row for made in pool.map(one, keys) for row in made]


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Held-out score over tokens: a thin line a seed; thick their mean, at their mean tokens."""
    for (arm, instruction), (label, colour, line) in CURVES.items():
        curves: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for one in rows:
            if one["arm"] == arm and (
                one["instruction"] == instruction or one["after"] == "before"
            ):
                tokens = one["training_tokens"] + one["search_tokens"]
                curves[one["seed"]].append((tokens / 1000, one["score"]))
        for curve in curves.values():
            axes.plot(*zip(*curve, strict=True), line, color=colour, linewidth=0.7, alpha=0.4)
        mean = np.mean(list(curves.values()), axis=0)
        axes.plot(*mean.T, line, color=colour, linewidth=2.2, marker="o", markersize=4, label=label)
    axes.set(
        title="SmolLM2-135M, small sums: what tokens buy",
        xlabel="thousand tokens of training and search",
        ylabel="held-out score",
    )
    legend_below(axes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fast-slow")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    about = {"commit": commit(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
             "device": device_name(), "threads": THREADS}  # fmt: skip
    made = [{**about, **one} for one in measure(args.work, args.seeds, args.jobs)]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, made[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(made)
    foot = f"python benchmarks/fast_slow.py, {about['commit']}, {about['date']}, {about['device']}"
    picture(RESULTS.with_suffix(".png"), [lambda axes: draw(axes, made)], foot)


if __name__ == "__main__":
    main()
