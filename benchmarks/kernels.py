#!/usr/bin/env python
"""Times every CPU kernel beside its peers and writes benchmarks/results/kernels_cpu.csv.

    python benchmarks/kernels.py [--only REGEX] [--threads 1 2] [--targets avx512 avx2] [--rounds 5]

Variants are interleaved: a round runs each of them once over a table that no cache holds (135M
parameters), and a row is the median of the rounds. The peers (torch loops of the reference, and an
in-place read-modify-write) run in the same rounds; the slow ones on a sixteenth of the table or a
layer, normalised per parameter. `--only` takes a regular expression over names such as
`update-gaussian-bfloat16-shadow-30`; rows that it does not touch stay in the file. What it does
not do: pin threads, or wait for a quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import peers
import torch
import workload
from rich.progress import Progress
from workload import Bench, Case

from esfast import _core

RESULTS = Path(__file__).parent / "results" / "kernels_cpu.csv"
KEY = ("device", "threads", "target", "kernel", "noise", "dtype", "memory", "population")
COLUMNS = (
    "commit", "date", *KEY, "parameters", "ns_per_parameter", "gb_per_s", "share_of_bandwidth",
    "times_peer",
)  # fmt: skip
PEER_POPULATION = {8: 8, 30: 30, 32: 30, 128: 128}  # Hadamard's group of 32 against torch's 30
Timer = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Contender:
    """A timed variant: `run` gives seconds a kernel; `parameters` normalises them."""

    case: Case
    parameters: int
    run: Timer


def device_name() -> str:
    source = Path("/proc/cpuinfo")
    lines = source.read_text(encoding="utf-8").splitlines() if source.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else os.uname().machine} x{os.cpu_count()}"


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


# ---- variants ----------------------------------------------------------------------------------


def ours(bench: Bench, case: Case) -> Contender:
    weights = bench.weights(case.memory)
    run = workload.passes(case, weights)

    def on_target() -> dict[str, float]:
        _core.set_target(case.target)
        return run()

    return Contender(case, bench.parameters, on_target)


def torch_cycle(dtype: str) -> Contender:
    small = list(workload.tensors(dtype, workload.SIXTEENTH).values())

    def run() -> dict[str, float]:
        there = workload.timed(lambda: peers.perturb(small, 1, workload.SIGMA))
        back = workload.timed(lambda: peers.perturb(small, 1, -workload.SIGMA))
        return {"perturb": there, "restore": back, "perturb+restore": there + back}

    return Contender(Case("cycle", "gaussian", dtype, "torch"), _total(small), run)


def torch_update(dtype: str, population: int) -> Contender:
    small = list(workload.tensors(dtype, workload.ONE_LAYER).values())
    scalars = workload.coefficients(population)

    def run() -> dict[str, float]:
        update = lambda: peers.update(small, range(population), scalars)  # noqa: E731
        return {"update": workload.timed(update)}

    return Contender(Case("update", "gaussian", dtype, "torch", population), _total(small), run)


def bandwidth(bench: Bench, dtype: str) -> Contender:
    buffer = bench.buffer()

    def run() -> dict[str, float]:
        return {"read-modify-write": workload.timed(lambda: peers.read_modify_write(buffer))}

    return Contender(Case("limit", "none", dtype, "in place"), bench.parameters, run)


def _total(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def contenders(bench: Bench, dtype: str, chosen: list[Case]) -> list[Contender]:
    """The limit, the peers that the chosen cases need, and the cases."""
    out = [bandwidth(bench, dtype)]
    if any(case.kernel == "cycle" for case in chosen):
        out.append(torch_cycle(dtype))
    needed = {PEER_POPULATION[case.population] for case in chosen if case.kernel == "update"}
    out += [torch_update(dtype, population) for population in sorted(needed)]
    return out + [ours(bench, case) for case in chosen]


# ---- measuring ---------------------------------------------------------------------------------


def measure(variants: list[Contender], rounds: int, advance: Callable[[], None]) -> dict:
    """Median ns a parameter by (case, kernel); one unmeasured round first, to touch all pages."""
    samples: dict[tuple[Case, str], list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for variant in variants:
            for kernel, seconds in variant.run().items():
                if number:
                    samples[variant.case, kernel].append(seconds * 1e9 / variant.parameters)
            advance()
    return {key: statistics.median(values) for key, values in samples.items()}


def rows_of(
    medians: dict[tuple[Case, str], float], parameters: dict[Case, int], threads: int
) -> list[dict[str, object]]:
    """A CSV row each median, with its share of the limit and its ratio to the torch loop."""
    limit = next(ns for (case, _), ns in medians.items() if case.kernel == "limit")
    stamp = {"commit": commit(), "date": datetime.now(timezone.utc).date().isoformat()}
    out = []
    for (case, kernel), ns in medians.items():
        memory = case.memory if case.memory in workload.MEMORIES else "lean"
        moved = workload.traffic(kernel, case.dtype, memory)
        size = workload.DTYPES[case.dtype].itemsize
        peer = medians.get((peer_of(case), kernel))
        out.append({
            **stamp, "device": device_name(), "threads": threads, "target": case.target or "torch",
            "kernel": kernel, "noise": case.noise, "dtype": case.dtype, "memory": case.memory,
            "population": case.population, "parameters": parameters[case],
            "ns_per_parameter": f"{ns:.4g}", "gb_per_s": f"{moved / ns:.4g}",
            "share_of_bandwidth": f"{(moved / ns) / (2 * size / limit):.3f}",
            "times_peer": f"{peer / ns:.4g}" if peer else "",
        })  # fmt: skip
    return out


def peer_of(case: Case) -> Case:
    population = PEER_POPULATION.get(case.population, case.population)
    return replace(case, noise="gaussian", memory="torch", population=population, target="")


def merge(path: Path, fresh: list[dict[str, object]]) -> None:
    """Replaces the rows with the same key, keeps the others, and writes the file atomically."""
    rows: dict[tuple[str, ...], dict[str, object]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = {tuple(row[k] for k in KEY): dict(row) for row in csv.DictReader(file)}
    rows.update({tuple(str(row[k]) for k in KEY): row for row in fresh})
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".csv")
    with os.fdopen(descriptor, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(path)


def run_dtype(dtype: str, args: argparse.Namespace, progress: Progress) -> None:
    """All chosen cases of one dtype, for every number of threads; writes after each."""
    every = [replace(case, target=t) for t in args.targets for case in workload.cases(dtype)]
    chosen = [case for case in every if re.search(args.only, str(case))]
    if not chosen:
        return
    bench = Bench(dtype, workload.FULL, args.threads[0])
    for threads in args.threads:
        bench.rethread(threads)
        variants = contenders(bench, dtype, chosen)
        total = (args.rounds + 1) * len(variants)
        task = progress.add_task(f"{dtype}, {threads} threads", total=total)
        medians = measure(variants, args.rounds, partial(progress.advance, task))
        parameters = {variant.case: variant.parameters for variant in variants}
        merge(args.output, rows_of(medians, parameters, threads))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression over variant names")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--targets", nargs="+", default=[_core.target()], choices=_core.targets())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    with Progress() as progress:
        for dtype in workload.DTYPES:
            run_dtype(dtype, args, progress)


if __name__ == "__main__":
    main()
