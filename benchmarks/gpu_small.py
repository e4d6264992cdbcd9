"""Every kernel once, on small odd tables: what compute-sanitizer is pointed at.

    python benchmarks/gpu_small.py [--few]

`--few`: bf16 alone, for the slower of the sanitizer's tools. Prints a line a table, so that a run
cut short says how far it came, and exits 0; the bits are tests/test_gpu.py's business.
"""

from __future__ import annotations

import sys

import torch

from esfast import Anchor, AnchoredDecay, ParameterTable, Weights
from esfast.device_shaping import shape_on_device
from esfast.members import Member

SIZES = (1, 7, 8, 513, 4099, 20_000)


def members(noise: str, count: int) -> list[Member]:
    shared = noise == "hadamard"
    return [Member(9 if shared else n, noise=noise, index=n if shared else 0) for n in range(count)]


def walk(dtype: torch.dtype, memory: str, noise: str, population: int) -> None:
    model = {f"w{n}": torch.randn(n, device="cuda").to(dtype) for n in SIZES}
    model["strided"] = torch.randn(60, 40, device="cuda").to(dtype)[::2, 1::2]
    model["odd"] = torch.randn(1000, device="cuda").to(dtype)[3:]
    table = ParameterTable.from_tensors(model)
    weights = Weights(table, memory, anchor=Anchor.in_memory(table))
    for sigma in (1e-4, 1.0):  # the second makes lean memory's lists grow
        weights.perturb(members(noise, 2)[1], sigma)
        weights.restore()
    decay = AnchoredDecay("l2", 1.0)
    values = [1e-3] * population
    weights.update(members(noise, population), values, decay=decay, alpha=0.1, seed=3)
    print(dtype, memory, noise, population, weights.checksum())


def main() -> None:
    torch.manual_seed(0)
    few = sys.argv[1:] == ["--few"]
    for dtype in (torch.bfloat16,) if few else (torch.bfloat16, torch.float32, torch.float16):
        for memory in ("lean", "shadow", "master"):
            for noise in ("gaussian", "rademacher", "hadamard"):
                walk(dtype, memory, noise, 3)
    walk(torch.bfloat16, "lean", "hadamard", 40)  # two groups: fewer copies of their tables
    walk(torch.bfloat16, "lean", "hadamard", 32 * 70)  # tables in global memory
    rewards = torch.rand(50, 7, dtype=torch.float64, device="cuda")
    for method in ("rank", "z_score", "centered_rank", "raw"):
        shape_on_device(rewards[:, 0].contiguous(), method)
    shape_on_device(rewards, "group_centered")
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
