#!/usr/bin/env python
"""Times a member's evaluation beside model.generate; writes benchmarks/results/generation_cpu.csv.

    python benchmarks/generation.py [--prompts 32 64] [--new-tokens 13] [--dtype bfloat16 float16]
                                    [--threads 2] [--rounds 5]

The default task's prompts, greedy, SmolLM2-135M. Rows of other dtypes and instructions stay in the
file; ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 before the
command makes torch take the processor for one without AVX-512. Variants are interleaved and a row
is the median of the rounds: `esfast` as training uses it, `esfast-plain` without the shared prefix,
`generate` transformers' own on the same prompts in one left-padded batch. Seconds are those of a
whole call, tokenised prompts to texts; tokens are those up to each row's end. What it does not do:
pin threads, or wait for a quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.progress import Progress

from esfast.engines import Sampling
from esfast.engines.transformers import TransformersEngine
from esfast.models import DEFAULT_MODEL, load_model
from esfast.provenance import commit, device_name

RESULTS = Path(__file__).parent / "results" / "generation_cpu.csv"
COLUMNS = ("commit", "date", "device", "instructions", "threads", "dtype", "prompts", "new_tokens",
           "variant", "seconds", "tokens_per_s", "times_peer")  # fmt: skip
PEER = "generate"
Variant = Callable[[], int]


def prompts(count: int) -> list[str]:
    """Questions of different lengths with a common beginning."""
    pairs = [(a, b) for a in range(1, 13) for b in range(1, 13)]
    return [f"What is {a} + {b}? Reply with the bare equation." for a, b in pairs[::-1][:count]]


def ours(loaded: Any, texts: list[str], new: int, share: bool) -> Variant:
    engine = TransformersEngine(
        loaded.model, loaded.tokenizer, batch_size=len(texts), share_prefix=share
    )
    return lambda: sum(c.tokens for c in engine.generate(texts, Sampling(new)))


def peer(loaded: Any, texts: list[str], new: int) -> Variant:
    loaded.tokenizer.padding_side = "left"
    inputs = loaded.tokenizer.apply_chat_template(
        [[{"role": "user", "content": text}] for text in texts],
        add_generation_prompt=True, padding=True, return_tensors="pt",
    )  # fmt: skip
    end = loaded.tokenizer.eos_token_id

    def run() -> int:
        with torch.inference_mode():
            out = loaded.model.generate(**inputs, max_new_tokens=new, do_sample=False)
        rows = out[:, inputs["input_ids"].shape[1] :]
        loaded.tokenizer.batch_decode(rows, skip_special_tokens=True)
        ended = (rows == end).int().cumsum(1)
        return int((ended - (rows == end).int() == 0).sum())

    return run


def measure(variants: dict[str, Variant], rounds: int, advance: Callable[[], None]) -> list[dict]:
    """A row a variant; one unmeasured round first."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    tokens = {}
    for number in range(rounds + 1):
        for name, run in variants.items():
            start = perf_counter()
            tokens[name] = run()
            if number:
                seconds[name].append(perf_counter() - start)
            advance()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {"variant": name, "seconds": round(value, 4), "tokens_per_s": round(tokens[name] / value),
         "times_peer": round(median[PEER] / value, 2)}
        for name, value in median.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[13])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with Progress() as progress:
        steps = 3 * (args.rounds + 1) * len(args.prompts) * len(args.new_tokens) * len(args.dtype)
        bar = progress.add_task("generation", total=steps)
        for dtype in args.dtype:
            for row in rows_of(dtype, args, lambda: progress.advance(bar)):
                rows.append(row)
                line = ", ".join(f"{key} {row[key]}" for key in COLUMNS[5:])
                progress.console.print(line, soft_wrap=True)
    write(rows)


def rows_of(
    dtype: str, args: argparse.Namespace, advance: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    loaded = load_model(DEFAULT_MODEL, dtype=getattr(torch, dtype))
    about = {"commit": commit(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
             "device": device_name(), "instructions": torch.backends.cpu.get_cpu_capability(),
             "threads": args.threads, "dtype": dtype}  # fmt: skip
    for count in args.prompts:
        for new in args.new_tokens:
            texts = prompts(count)
            variants = {
                "esfast": ours(loaded, texts, new, True),
                "esfast-plain": ours(loaded, texts, new, False),
                PEER: peer(loaded, texts, new),
            }
            for row in measure(variants, args.rounds, advance):
                yield {**about, "prompts": count, "new_tokens": new, **row}


def write(rows: list[dict[str, Any]]) -> None:
    """Into the file, in the place of earlier rows of the same instructions and dtypes."""
    kind = ("instructions", "dtype")
    new = {tuple(row[key] for key in kind) for row in rows}
    if RESULTS.exists():
        with RESULTS.open(newline="", encoding="utf-8") as file:
            old = [r for r in csv.DictReader(file) if tuple(r[key] for key in kind) not in new]
        rows = [*old, *rows]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
