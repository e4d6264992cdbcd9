#!/usr/bin/env python
"""What the vector ports allow: the Gaussian update's instructions, none waiting for another.

    python benchmarks/ports.py [--repeats 9]        # writes benchmarks/results/ports_cpu.csv

The inner loop of the AVX-512 target's update makes 192 normals (three batches of 16 counters) in
504 vector operations, counted in its machine code (GCC 12, `MIX`). Here the same operations run
evenly mixed on registers that nobody writes, so that neither latency nor order matters: what they
take is the least that any order of them can take on this core. The core's own figure is an update
of 1 thread over a table in the second-level cache, by 128 members, its one pass over the weights
included. Both are medians of alternating runs, in ns a normal. What it does not bound: other
instructions that would give the same bits. Needs g++ and AVX-512.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter

import torch

from esfast import Member, ParameterTable, Weights, _core
from esfast.provenance import commit, device_name

RESULTS = Path(__file__).parent / "results" / "ports_cpu.csv"
NORMALS, MEMBERS, PARAMETERS = 192, 128, 1 << 17
MIX = {
    "vpmuludq {a},{b},{d}": 102,
    "vmovshdup {a},{d}": 51,
    "vshufps $0xDD,{a},{b},{d}": 57,
    "vmovsldup {a},{d}%{{%%k1%}}": 45,
    "vpternlogd $0x96,{a},{b},{d}": 51,
    "vfmadd231ps {a},{b},{d}": 102,
    "vmulps {a},{b},{d}": 30,
    "vpxord {a},{b},{d}": 12,
    "vcvtdq2ps {a},{d}": 12,
    "vgetmantps $7,{a},{d}": 6,
    "vpermt2ps {a},{b},{d}": 6,
    "vpsrld $23,{a},{d}": 6,
    "vpaddd {a},{b},{d}": 6,
    "vpord {a},{b},{d}": 6,
    "vaddps {a},{b},{d}": 6,
    "vsqrtps {a},{d}": 6,
}
SOURCE = """
#include <chrono>
#include <cstdio>
int main() {{
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < {loops}; ++i) asm volatile({body} ::: "memory");
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("%.6f\\n", took.count() * 1e9 / {loops} / {normals});
}}
"""


def evenly(mix: dict[str, int]) -> list[str]:
    """Every operation as often as `mix` says, each spread over the whole."""
    places = [
        ((k + 0.5) / count, operation) for operation, count in mix.items() for k in range(count)
    ]
    return [operation for _, operation in sorted(places)]


def source() -> str:
    """Sources are registers 0 to 7, which stay zero; destinations the other 24 in turn."""
    clear = [f'"vpxord %%zmm{n},%%zmm{n},%%zmm{n}\\n"' for n in range(8)]
    clear.append('"kxnorw %%k1,%%k1,%%k1\\n"')
    lines = [
        '"'
        + operation.format(a=f"%%zmm{k % 8}", b=f"%%zmm{k * 3 % 8}", d=f"%%zmm{8 + k % 24}")
        + '\\n"'
        for k, operation in enumerate(evenly(MIX))
    ]
    return SOURCE.format(loops=200_000, normals=NORMALS, body="\n".join(clear + lines))


def core_ns(weights: Weights) -> float:
    """ns a normal of one update."""
    members = [Member(seed) for seed in range(MEMBERS)]
    start = perf_counter()
    for _ in range(4):
        weights.update(members, [1e-9] * MEMBERS)
    return (perf_counter() - start) * 1e9 / (4 * MEMBERS * PARAMETERS)


def measure(repeats: int) -> tuple[float, float]:
    """Medians: the mix's and the core's."""
    table = ParameterTable.from_tensors({"weights": torch.randn(PARAMETERS).bfloat16()})
    weights = Weights(table, memory="lean", threads=1)
    with tempfile.TemporaryDirectory() as folder:
        code, binary = Path(folder) / "mix.cpp", Path(folder) / "mix"
        code.write_text(source(), encoding="utf-8")
        subprocess.run(["g++", "-O2", "-mavx512f", code, "-o", binary], check=True)
        rows = [
            (
                float(subprocess.run([binary], check=True, capture_output=True).stdout),
                core_ns(weights),
            )
            for _ in range(repeats)
        ]
    mix, core = zip(*rows, strict=True)
    return statistics.median(mix), statistics.median(core)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if _core.target() != "avx512":
        raise SystemExit(f"the target here is {_core.target()}; this counts AVX-512's operations.")
    mix, core = measure(args.repeats)
    row = {
        "device": device_name(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "threads": 1,
        "ports_ns_per_normal": f"{mix:.4f}",
        "core_ns_per_normal": f"{core:.4f}",
        "share_of_ports": f"{mix / core:.3f}",
    }
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
