"""On a CUDA device: its own instructions, for every number there is. Not yet run on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import NEEDS_KERNELS, assert_bits

from esfast import _core

pytestmark = [pytest.mark.gpu, NEEDS_KERNELS]


def test_square_roots_exhaustively() -> None:
    """Every fp32 number from 2^-60 to 64, and both zeros, against the CPU's rounded root."""
    stream = torch.cuda.current_stream().cuda_stream
    step, last = 1 << 24, 0x42800000
    out = torch.empty(step, device="cuda")
    for first in [0, 0x80000000, *range(0x21800000, last, step)]:
        count = 1 if first in (0, 0x80000000) else step
        _core.cuda.roots(0, stream, first, count, out.data_ptr())
        bits = np.arange(first, first + count, dtype=np.uint64).astype(np.uint32)
        want = np.sqrt(bits.view(np.float32))
        assert_bits(out[:count].cpu(), want.view(np.uint32), f"roots from {first:#x}")


def test_roundings_to_bfloat16_exhaustively() -> None:
    """All 2^32 fp32 numbers against torch's conversion; every NaN is 0x7FC0."""
    stream = torch.cuda.current_stream().cuda_stream
    step = 1 << 26
    out = torch.empty(step, dtype=torch.bfloat16, device="cuda")
    for first in range(0, 1 << 32, step):
        _core.cuda.roundings(0, stream, first, step, out.data_ptr())
        signed = first - (1 << 32) * (first >= 1 << 31)
        numbers = torch.arange(signed, signed + step, dtype=torch.int32, device="cuda")
        values = numbers.view(torch.float32)
        want = values.to(torch.bfloat16).view(torch.int16)
        want[values.isnan()] = 0x7FC0
        wrong = (out.view(torch.int16) != want).nonzero()
        assert not len(wrong), f"fp32 {first + int(wrong[0]):#x} -> {out[wrong[0]].item()}"
