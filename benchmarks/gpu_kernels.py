"""The CUDA kernels' time on this device, torch's loops beside them, and a whole 8B generation.

    python benchmarks/gpu_kernels.py OUT.csv [--elements N] [--budget SECONDS]

Medians of repeated, event-timed calls after two warm-up calls, over tables many times the L2. Bytes
are those that the kernel must move (each weight read and written once, lists counted as held); the
copy is a device-to-device copy, read and written bytes together. The peer is the loop that ES
scripts run: one generator a member, `randn_like`, `add_`, and for updates the same noise again for
every member. Rows are written as they are measured, losing ones too.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from esfast import ParameterTable, Weights
from esfast.bench.workload import cuda_seconds
from esfast.members import Member
from esfast.provenance import commit

FIELDS = ("what", "noise", "memory", "population", "elements", "ms", "ns_per_parameter", "gb_s")
FIELDS += ("share_of_copy", "normals_s", "peer_ms", "times_peer", "device", "threads", "commit")
SIGMA = 1e-3


def timed(
    call: Callable[[], Any],
    repeats: int = 7,
    warmups: int = 2,
    before: Callable[[], Any] | None = None,
) -> float:
    """Median milliseconds of a call, by events on the current stream; `before` is not counted."""
    times = []
    for k in range(warmups + repeats):
        if before is not None:
            before()
        ms = 1e3 * cuda_seconds(call)
        if k >= warmups:
            times.append(ms)
    return statistics.median(times)


class Rows:
    """The table so far: on disk after each row, and printed at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.copy_gb_s = 0.0
        self.rows: list[dict[str, Any]] = []
        device = torch.cuda.get_device_name()
        self.fixed = {"device": device, "threads": 1, "commit": commit() or "unknown"}

    def add(self, what: str, elements: int, ms: float, moved: float = 0.0, **more: Any) -> None:
        row = {"what": what, "elements": elements, "ms": round(ms, 4), **more, **self.fixed}
        row["ns_per_parameter"] = round(ms * 1e6 / elements, 5)
        if moved:
            row["gb_s"] = round(moved / ms / 1e6, 1)
            row["share_of_copy"] = round(row["gb_s"] / self.copy_gb_s, 3) if self.copy_gb_s else ""
        if more.get("noise") == "gaussian":
            row["normals_s"] = f"{elements * more.get('population', 1) / ms * 1e3:.3e}"
        if more.get("peer_ms"):
            row["times_peer"] = round(more["peer_ms"] / ms, 2)
        self.rows.append(row)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, restval="")
            writer.writeheader()
            writer.writerows(self.rows)

    def show(self) -> None:
        shown = ("what", "noise", "memory", "population", "ms", "ns_per_parameter", "gb_s")
        shown += ("share_of_copy", "normals_s", "times_peer")
        widths = [16, 10, 7, 10, 10, 16, 8, 13, 10, 10]
        print("  ".join(f"{name:>{w}}" for name, w in zip(shown, widths, strict=True)))
        for row in self.rows:
            cells = [f"{row.get(name, '')!s:>{w}}" for name, w in zip(shown, widths, strict=True)]
            print("  ".join(cells))


def measure_copy(rows: Rows) -> None:
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = timed(lambda: target.copy_(source))
    rows.copy_gb_s = 2 * source.numel() / ms / 1e6
    rows.add("copy", source.numel(), ms, 2.0 * source.numel())


def members_of(noise: str, count: int) -> list[Member]:
    shared = noise == "hadamard"
    return [Member(5 if shared else n, noise=noise, index=n if shared else 0) for n in range(count)]


# ---- torch's loops -----------------------------------------------------------------------------


def torch_perturb(model: dict[str, torch.Tensor], seed: int, scale: float) -> None:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    for tensor in model.values():
        noise = torch.randn(tensor.shape, generator=generator, device="cuda", dtype=tensor.dtype)
        tensor.add_(noise, alpha=scale)


def torch_update(model: dict[str, torch.Tensor], population: int) -> None:
    for k, tensor in enumerate(model.values()):
        total = torch.zeros_like(tensor)
        for seed in range(population):
            generator = torch.Generator(device="cuda").manual_seed(seed + k)
            noise = torch.randn(
                tensor.shape, generator=generator, device="cuda", dtype=tensor.dtype
            )
            total.add_(noise, alpha=1e-5 * (seed - population / 2))
        tensor.add_(total)


# ---- single kernels ----------------------------------------------------------------------------


def measure_lean(rows: Rows, table: ParameterTable, peer: float) -> None:
    """The perturbation's time has the look at its counter in it, as a user's has."""
    for noise in ("gaussian", "rademacher", "hadamard"):
        weights = Weights(table, "lean")
        perturb = partial(weights.perturb, members_of(noise, 1)[0], SIGMA)
        perturb()
        moved = 2.0 * table.nbytes + weights.memory_use().extra_bytes
        fixed = {"noise": noise, "memory": "lean"}
        ms = timed(perturb, before=weights.restore)
        rows.add("perturb", table.numel, ms, moved, **fixed, peer_ms=peer)
        rows.add("restore", table.numel, timed(weights.restore, before=perturb), moved, **fixed)


def measure_shadow(rows: Rows, table: ParameterTable, peer: float) -> None:
    weights = Weights(table, "shadow")
    moved = 2.0 * table.nbytes
    for noise in ("gaussian", "rademacher", "hadamard"):
        ms = timed(partial(weights.perturb, members_of(noise, 1)[0], SIGMA))
        rows.add("perturb", table.numel, ms, moved, noise=noise, memory="shadow", peer_ms=peer)
    rows.add("refresh", table.numel, timed(partial(weights._core.refresh, 1)), moved)
    rows.add("checksum", table.numel, timed(weights.checksum), moved / 2)


def measure_updates(rows: Rows, table: ParameterTable, peer: float) -> None:
    weights = Weights(table, "lean")
    for noise, size in (("gaussian", 30), ("hadamard", 32), ("hadamard", 128), ("rademacher", 30)):
        update = partial(weights.update, members_of(noise, size), [1e-7] * size, seed=1)
        fixed = {"noise": noise, "memory": "lean", "population": size}
        ms = timed(update, 5)
        rows.add("update", table.numel, ms, 2.0 * table.nbytes, **fixed, peer_ms=peer)


def measure_kernels(rows: Rows, elements: int) -> None:
    model = {"w": torch.empty(elements, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)}
    table = ParameterTable.from_tensors(model)
    peer = timed(partial(torch_perturb, model, 1, SIGMA), 3)
    rows.add("torch perturb", elements, peer)
    measure_shadow(rows, table, peer)
    measure_lean(rows, table, peer)
    peer = timed(partial(torch_update, model, 30), 1, 0)
    rows.add("torch update", elements, peer, population=30)
    measure_updates(rows, table, peer)


# ---- a generation of an 8B model ---------------------------------------------------------------


def eight_billion() -> dict[str, torch.Tensor]:
    """The shapes of a Llama-3 8B, bf16, 8.03e9 parameters."""
    shapes = {"embed": (128_256, 4096), "head": (128_256, 4096), "norm": (4096,)}
    for k in range(32):
        layer = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
        layer |= {"gate": (14_336, 4096), "up": (14_336, 4096), "down": (4096, 14_336)}
        layer |= {"norm1": (4096,), "norm2": (4096,)}
        shapes |= {f"layers.{k}.{name}": shape for name, shape in layer.items()}
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    return {name: torch.empty(shape, **make).normal_(0, 0.02) for name, shape in shapes.items()}


def generation(weights: Weights, noise: str, population: int) -> None:
    members = members_of(noise, population)
    for member in members:
        weights.perturb(member, SIGMA)
    weights.restore()
    weights.update(members, [1e-7] * population, seed=2)


def torch_generation(model: dict[str, torch.Tensor], population: int) -> None:
    for seed in range(population):
        torch_perturb(model, seed, SIGMA)
        torch_perturb(model, seed, -SIGMA)
    torch_update(model, population)


def measure_generations(rows: Rows, deadline: float) -> None:
    model = eight_billion()
    table = ParameterTable.from_tensors(model)
    peer = timed(partial(torch_generation, model, 30), 1, 0)
    rows.add("torch generation", table.numel, peer, population=30)
    for noise, memory in (
        ("gaussian", "shadow"),
        ("hadamard", "shadow"),
        ("gaussian", "lean"),
        ("hadamard", "lean"),
    ):
        if time.monotonic() > deadline:
            print("generations: out of time")
            return
        weights = Weights(table, memory)
        ms = timed(partial(generation, weights, noise, 30), 2, 1)
        fixed = {"noise": noise, "memory": memory, "population": 30}
        rows.add("generation", table.numel, ms, **fixed, peer_ms=peer)
        extra = weights.memory_use().extra_bytes
        print(f"generation {noise} {memory}: {ms:.1f} ms, {extra / 1e9:.2f} GB beside the weights")
        del weights
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--elements", type=int, default=1_000_000_000)
    parser.add_argument("--budget", type=float, default=150.0)
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget
    rows = Rows(options.output)
    try:
        measure_copy(rows)
        measure_kernels(rows, options.elements)
        torch.cuda.empty_cache()
        measure_generations(rows, deadline)
    finally:
        rows.show()


if __name__ == "__main__":
    main()
