"""Two builds of the core in alternation: ns a parameter, before and after.

    python benchmarks/builds.py OLD NEW [--rounds 3]

OLD and NEW are checkouts, each with its core built in place. Every round runs one process of each,
the same calls over 134 M bf16 weights on two threads; printed are the medians. Neighbours of a
virtual machine change by the hour, and one table of figures cannot be compared with another's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

PARAMETERS, TENSORS, CALLS = 134_217_728, 64, 7


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    begun = perf_counter()
    call()
    return perf_counter() - begun


def passes(weights: Any, noise: str, size: int) -> Iterator[tuple[str, float]]:
    """The kernels of one noise, and their seconds."""
    from esfast import Member

    places = range(size) if noise == "hadamard" else [0] * size
    people = [Member(7 + n * (noise != "hadamard"), 1, noise, k) for n, k in enumerate(places)]
    scalars = [1e-6 * (n - size / 2) for n in range(size)]
    perturb = partial(weights.perturb, people[0], 1e-3)
    update = partial(weights.update, people, scalars, seed=11)
    turns = [(seconds(perturb), seconds(weights.restore)) for _ in range(CALLS)]
    yield f"{noise} perturb", median(turn[0] for turn in turns)
    yield f"{noise} restore", median(turn[1] for turn in turns)
    yield f"{noise} update {size}", median(seconds(update) for _ in range(CALLS))


def measured() -> dict[str, float]:
    """ns a parameter of each call, of the esfast that Python finds."""
    import torch

    from esfast import ParameterTable, Weights

    torch.manual_seed(0)
    shape = (PARAMETERS // TENSORS // 1024, 1024)
    model = {f"w{n}": (torch.randn(shape) * 0.03).bfloat16() for n in range(TENSORS)}
    out = {}
    for memory in ("lean", "shadow", "master"):
        weights = Weights(ParameterTable.from_tensors(model), memory=memory, threads=2)
        for noise, size in (("gaussian", 8), ("rademacher", 30), ("hadamard", 32)):
            for name, taken in passes(weights, noise, size):
                out[f"{memory} {name}"] = taken / PARAMETERS * 1e9
    return out


def run(checkout: Path) -> dict[str, float]:
    """`measured` in a process of its own, of that checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, str(Path(__file__).resolve())]
    done = subprocess.run(command, env=environment, cwd="/", check=True, stdout=subprocess.PIPE)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pairs = [(run(args.old), run(args.new)) for _ in range(args.rounds)]
    for name in pairs[0][0]:
        old, new = (median(pair[side][name] for pair in pairs) for side in (0, 1))
        print(f"{name:32} {old:7.3f} {new:7.3f}  {new / old:.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main()
    else:
        print(json.dumps(measured()))
