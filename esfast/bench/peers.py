"""What esfast is measured against: the published torch loops, and plain passes over memory.

The loops are written from the description in arXiv 2509.24372 and its follow-ups: a generator
seeded anew for every tensor, `torch.randn` materialised in the weights' dtype, and an update that
walks the population per tensor. They are not exact (a restore by subtraction drifts), which is
the point; here only their time counts. Bytes are counted as the operations ask for them; what a
cache keeps of a small tensor between two operations is not subtracted.
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
    """w <- w + sigma * noise; with -sigma it is the restore by subtraction.

    Moves six times the weights' dtype, 12 B a parameter in bf16: the noise is written (2), read and
    written again as sigma * noise (4), and added (6).
    """
    for weight in weights:
        weight.add_(sigma * draw(weight, seed))


@torch.inference_mode()
def update(
    weights: Iterable[torch.Tensor],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    step: float = 1.0,
) -> None:
    """w <- w + step * sum_n c_n * noise_n, accumulated in fp32, tensor by tensor.

    Moves 864 B a parameter in bf16 at population 30. A member, 28 B: the noise is written in the
    weights' dtype (2), cast to fp32 (6), multiplied by its coefficient (8) and added to the
    accumulator (12). Once, 24 B: the accumulator is zeroed (4) and scaled by the step (8), cast
    back (6) and added to the weights (6). In fp32 the casts are free: 24 B and 24 B.
    """
    for weight in weights:
        total = torch.zeros_like(weight, dtype=torch.float32)
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            total.add_(draw(weight, seed).to(torch.float32) * coefficient)
        weight.add_(total.mul_(step).to(weight.dtype))


def perturb_bytes(itemsize: int) -> int:
    """Bytes a parameter of `perturb`; itemsize: of the weights' dtype."""
    return 6 * itemsize


def update_bytes(itemsize: int, population: int) -> int:
    """Bytes a parameter of `update`."""
    cast = 0 if itemsize == 4 else itemsize + 4
    return population * (itemsize + cast + 8 + 12) + 4 + 8 + cast + 3 * itemsize


@torch.inference_mode()
def copy(source: torch.Tensor, destination: torch.Tensor) -> None:
    """Every byte of one buffer read, every byte of another written."""
    destination.copy_(source)


@torch.inference_mode()
def read_modify_write(buffer: torch.Tensor) -> None:
    """The floor of any in-place pass: one int32 buffer, every byte read once and written once."""
    buffer.bitwise_xor_(1)


@torch.inference_mode()
def read(buffer: torch.Tensor) -> None:
    """Every byte read once: a dot product with itself, in fp32; zeros, so that it stays quick."""
    values = buffer.view(torch.float32)
    torch.dot(values, values)
