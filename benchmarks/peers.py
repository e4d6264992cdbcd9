"""What esfast is measured against: the published torch loops, and the machine's own limit.

The loops are written from the description in arXiv 2509.24372 and its follow-ups: a generator
seeded anew for every tensor, `torch.randn` materialised in the weights' dtype, and an update that
walks the population per tensor. They are not exact (a restore by subtraction drifts), which is
the point; here only their time counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


def draw(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """The noise of one tensor: a generator with the member's seed, whichever tensor it is."""
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    return torch.randn(weight.shape, dtype=weight.dtype, device=weight.device, generator=generator)


@torch.inference_mode()
def perturb(weights: Iterable[torch.Tensor], seed: int, sigma: float) -> None:
    """w <- w + sigma * noise; with -sigma it is the restore by subtraction."""
    for weight in weights:
        weight.add_(sigma * draw(weight, seed))


@torch.inference_mode()
def update(
    weights: Iterable[torch.Tensor], seeds: Sequence[int], coefficients: Sequence[float]
) -> None:
    """w <- w + sum_n c_n * noise_n, accumulated in the weights' dtype, tensor by tensor."""
    for weight in weights:
        total = torch.zeros_like(weight)
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            total.add_(draw(weight, seed), alpha=coefficient)
        weight.add_(total)


@torch.inference_mode()
def read_modify_write(buffer: torch.Tensor) -> None:
    """The floor of any in-place pass: one int32 buffer, every byte read once and written once."""
    buffer.bitwise_xor_(1)
