#!/usr/bin/env python
"""Times a whole ES generation in vLLM; writes benchmarks/results/vllm_generation_cpu.csv.

    python benchmarks/vllm_generation.py [--population 8] [--prompts 32] [--new-tokens 16]

SmolLM2-135M in bfloat16, one engine in this process, the default task's prompts, greedy. Variants
take turns, a row is the median of the rounds:

    esfast       a perturbation a member (which restores the last), one update
    reference    the workers of published scripts, as plain torch loops over the same tensors: a
                 generator a tensor with the member's seed, randn, add in place; restored by
                 subtraction; the update adds every member's noise again

After each edit both make again what vLLM's CPU backend packs (without that, the reference's edits
would not reach an answer), and empty the prefix cache. `changed`: the share of weights that are not
what they were once all members are restored. The last rows are tokens a second of one call of
`generate`, beside esfast's transformers engine. What it does not do: wait for a quiet machine (the
load is in the rows).
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

# kernels.py beside this file is not the `kernels` that transformers looks for.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]

import torch
from rich.progress import Progress

from esfast.engines.base import Sampling
from esfast.engines.transformers import TransformersEngine
from esfast.engines.vllm import VLLMEngine
from esfast.members import Member
from esfast.models import DEFAULT_MODEL, load_model
from esfast.provenance import commit, device_name

RESULTS = Path(__file__).parent / "results" / "vllm_generation_cpu.csv"
COLUMNS = ("commit", "date", "device", "load", "threads", "population", "prompts", "new_tokens",
           "variant", "seconds", "generate_s", "perturb_restore_s", "update_s", "outside_share",
           "changed", "tokens_per_s", "times_peer")  # fmt: skip
SIGMA, ALPHA = 1e-3, 5e-4
Parts = dict[str, float]


def prompts(count: int) -> list[str]:
    """Questions with a common beginning, as benchmarks/generation.py asks them."""
    pairs = [(a, b) for a in range(1, 13) for b in range(1, 13)]
    return [f"What is {a} + {b}? Reply with the bare equation." for a, b in pairs[::-1][:count]]


class Reference:
    """The published workers' methods over a shard's tensors, from their description."""

    def __init__(self, shard: Any) -> None:
        self.tensors = [segment.tensor for segment in shard.table.segments]
        self.derived = shard.kept.derived

    def add(self, seed: int, scale: float) -> None:
        for tensor in self.tensors:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
            tensor.add_(scale * noise)

    def perturb(self, seed: int) -> None:
        self.add(seed, SIGMA)
        self.derived.redo()

    def restore(self, seed: int) -> None:
        self.add(seed, -SIGMA)

    def update(self, seeds: list[int], coefficients: list[float]) -> None:
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            self.add(seed, coefficient)
        self.derived.redo()


class Ours:
    """esfast's, through the same calls as in training."""

    def __init__(self, engine: VLLMEngine) -> None:
        self.weights = engine.live_weights("lean")

    def perturb(self, seed: int) -> None:
        self.weights.perturb(Member(seed), SIGMA)

    def restore(self, seed: int) -> None:
        self.weights.restore()

    def update(self, seeds: list[int], coefficients: list[float]) -> None:
        self.weights.update([Member(seed) for seed in seeds], coefficients)


def timed(parts: Parts, name: str, call: Callable[[], object]) -> None:
    start = perf_counter()
    call()
    parts[name] = parts.get(name, 0.0) + perf_counter() - start


def generation(
    side: Any, generate: Callable[[], int], seeds: list[int], tensors: list[torch.Tensor]
) -> Parts:
    """Seconds of the parts of one generation, the share of weights changed, tokens generated."""
    before = [tensor.clone() for tensor in tensors]
    parts: Parts = {"tokens": 0.0}
    for seed in seeds:
        timed(parts, "perturb_restore_s", lambda seed=seed: side.perturb(seed))  # type: ignore[misc]
        start = perf_counter()
        parts["tokens"] += generate()
        parts["generate_s"] = parts.get("generate_s", 0.0) + perf_counter() - start
        timed(parts, "perturb_restore_s", lambda seed=seed: side.restore(seed))  # type: ignore[misc]
    differ = sum(int((a != b).sum()) for a, b in zip(before, tensors, strict=True))
    parts["changed"] = differ / sum(tensor.numel() for tensor in tensors)
    coefficients = [ALPHA / len(seeds) * (n - len(seeds) / 2) for n in range(len(seeds))]
    timed(parts, "update_s", lambda: side.update(seeds, coefficients))
    return parts


def row_of(rounds: list[Parts]) -> dict[str, Any]:
    median = {name: statistics.median(parts[name] for parts in rounds) for name in rounds[0]}
    inside, outside = median["generate_s"], median["perturb_restore_s"] + median["update_s"]
    named = {name: round(median[name], 4) for name in COLUMNS if name in median}
    return {
        **named,
        "seconds": round(inside + outside, 3),
        "outside_share": round(outside / (inside + outside), 4),
        "tokens_per_s": round(median["tokens"] / inside),
    }


def generations(
    engine: VLLMEngine, texts: list[str], args: argparse.Namespace, advance: Callable[[], None]
) -> list[dict[str, Any]]:
    """A row a variant; every variant starts each round from the base's weights."""
    executor = engine._llm.llm_engine.model_executor
    shard = executor.driver_worker.worker._esfast_shard()
    sides = {"esfast": Ours(engine), "reference": Reference(shard)}
    tensors = [segment.tensor for segment in shard.table.segments]
    sampling = Sampling(args.new_tokens)
    kept: dict[str, list[Parts]] = {name: [] for name in sides}
    for number in range(args.rounds + 1):
        for name, side in sides.items():
            engine._call("load", str(engine.folder))
            seeds = [1 + number * args.population + n for n in range(args.population)]
            generate = lambda: sum(c.tokens for c in engine.generate(texts, sampling))  # noqa: E731
            parts = generation(side, generate, seeds, tensors)
            if number:  # the first warms up
                kept[name].append(parts)
            advance()
    rows = [{"variant": name, **row_of(rounds)} for name, rounds in kept.items()]
    for row in rows:
        row["times_peer"] = round(rows[1]["seconds"] / row["seconds"], 2)
    return rows


def calls(
    engines: dict[str, Any], texts: list[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Tokens a second of a call of `generate` of each engine, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    tokens = {}
    for number in range(args.rounds + 1):
        for name, engine in engines.items():
            start = perf_counter()
            tokens[name] = sum(c.tokens for c in engine.generate(texts, Sampling(args.new_tokens)))
            if number:
                seconds[name].append(perf_counter() - start)
    rates = {name: tokens[name] / statistics.median(times) for name, times in seconds.items()}
    return [
        {"variant": f"generate, {name}", "seconds": round(tokens[name] / rate, 4),
         "tokens_per_s": round(rate), "times_peer": round(rate / rates["transformers"], 2)}
        for name, rate in rates.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    torch.set_num_threads(args.threads)
    texts = prompts(args.prompts)
    options = {"max_model_len": 1024, "enforce_eager": args.eager}
    engine = VLLMEngine(DEFAULT_MODEL, threads=args.threads, options=options)
    loaded = load_model(DEFAULT_MODEL)
    with Progress() as progress:
        bar = progress.add_task("generations", total=2 * (args.rounds + 1))
        rows = generations(engine, texts, args, lambda: progress.advance(bar))
    both = {"vllm": engine, "transformers": TransformersEngine(loaded.model, loaded.tokenizer)}
    rows += calls(both, texts, args)
    about = {"commit": commit(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
             "device": device_name(), "load": round(os.getloadavg()[0], 2),
             "threads": args.threads, "population": args.population, "prompts": args.prompts,
             "new_tokens": args.new_tokens}  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**about, **row} for row in rows)
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    engine.close()


if __name__ == "__main__":
    main()
