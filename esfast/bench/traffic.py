"""What a pass costs a parameter: bytes that it cannot avoid moving, and values that it draws.

    ours     the bytes of the weights, and of the base where there is one, once each way; lean's
             records (1.2 bits a parameter on SmolLM2) are not counted
    peers    every operand of every operation (peers.py)
    buffers  copy 2, read-modify-write 2, read 1 times the dtype

So a share of the bandwidth says how far a pass is from the limit, not how busy the bus was. A value
drawn is one number for one weight: a Gaussian or Rademacher member's, or the 32-bit word that a
group of 32 Hadamard members share.
"""

from __future__ import annotations

import torch

from esfast.bench import peers
from esfast.bench.workload import (
    BUFFER,
    CACHE,
    CHECKSUM,
    CYCLE,
    DTYPES,
    EXCHANGE,
    TORCH,
    UPDATE,
    Case,
)

GROUP = 32  # Hadamard members that share a word
BUFFER_PASSES = {"copy": 2, "read-modify-write": 2, "read": 1}


def moved(case: Case, kernel: str) -> int:
    """Bytes a parameter; 0 on a table that stays in the cache."""
    size = DTYPES[case.dtype].itemsize
    if case.memory == CACHE:
        return 0
    if case.memory == BUFFER:
        return BUFFER_PASSES[kernel] * size
    if case.memory == TORCH:
        return _moved_by_torch(kernel, size, case.population)
    if kernel == CHECKSUM:
        return size
    base = base_bytes(case.memory, DTYPES[case.dtype])
    if kernel == UPDATE:
        return 2 * base + size if base else 2 * size
    one_way = base + size if base else 2 * size
    return 2 * one_way if kernel == CYCLE else one_way


def base_bytes(memory: str, dtype: torch.dtype) -> int:
    """Bytes a parameter of the copy that a memory mode keeps beside the weights."""
    return {"shadow": dtype.itemsize, "master": 4}.get(memory, 0)


def drawn(case: Case, kernel: str) -> int:
    """Values drawn a parameter. A restore draws again in lean memory and copies in the others."""
    if case.noise == "none":
        return 0
    if kernel == UPDATE:
        return -(-case.population // GROUP) if case.noise == "hadamard" else case.population
    if kernel == EXCHANGE:
        return 2
    again = int(case.memory in ("lean", TORCH))
    if kernel == "restore":
        return again
    return 1 + again if kernel == CYCLE else 1


def normals(case: Case, kernel: str) -> int:
    """Members' values put into each weight: the population of an update, one in a perturbation."""
    return case.population if kernel == UPDATE and case.noise != "none" else drawn(case, kernel)


def _moved_by_torch(kernel: str, size: int, population: int) -> int:
    if kernel == UPDATE:
        return peers.update_bytes(size, population)
    return peers.perturb_bytes(size) * (2 if kernel == CYCLE else 1)
