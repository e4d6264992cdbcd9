"""Weights that break naive code, and comparisons that name the first wrong element.

Tensors are made from bits and compared as bits: -0, subnormals and NaN payloads count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import reference
import torch
from reference import Bits

from esfast import ParameterTable, Weights, _core
from esfast.members import NOISES as NOISES
from esfast.members import Member

DTYPES = ("bfloat16", "float16", "float32")
MODES = ("lean", "shadow")
TORCH = {name: getattr(torch, name) for name in DTYPES}
NEEDS_KERNELS = pytest.mark.skipif(
    not (torch.cuda.is_available() and hasattr(_core, "cuda")),
    reason="no CUDA device, or no kernels in this build",
)
_STORED = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}


def tensor_of(bits: Bits, dtype: str, shape: Sequence[int] | None = None) -> torch.Tensor:
    """A fresh contiguous tensor with exactly these bits."""
    signed = torch.from_numpy(bits.copy().view(f"int{bits.itemsize * 8}"))
    return signed.view(TORCH[dtype]).reshape(tuple(shape) if shape is not None else bits.shape)


def bits_of(tensor: torch.Tensor) -> Bits:
    """The bits of a tensor's elements in row-major order, as unsigned integers."""
    stored, unsigned = _STORED[tensor.element_size()]
    flat = tensor.detach().contiguous().view(stored).reshape(-1)
    return flat.numpy().view(unsigned).copy()


def dtype_of(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def assert_bits(got: torch.Tensor | Bits, want: torch.Tensor | Bits, what: str = "") -> None:
    """Equality of bits; the message names how many differ, the first one and both values."""
    left, right = (
        bits_of(x) if isinstance(x, torch.Tensor) else x.reshape(-1) for x in (got, want)
    )
    assert left.shape == right.shape and left.dtype == right.dtype, (what, left.shape, right.shape)
    wrong = np.flatnonzero(left != right)
    if wrong.size:
        at = int(wrong[0])
        seen = f"{int(left[at]):#x}, expected {int(right[at]):#x}"
        raise AssertionError(f"{what}: {wrong.size} of {left.size} differ, first [{at}]: {seen}")


def special_bits(dtype: str) -> Bits:
    """Both zeros, subnormals, extremes, infinities, NaNs with payloads, ones and neighbours."""
    exponent = reference.INFINITY[dtype]
    lowest = {"float32": 0x00800000, "float16": 0x0400, "bfloat16": 0x0080}[dtype]
    one = {"float32": 0x3F800000, "float16": 0x3C00, "bfloat16": 0x3F80}[dtype]
    magnitudes = [0, 1, 2, 3, lowest - 1, lowest, lowest + 1, lowest // 2, exponent - 1]
    magnitudes += [exponent - 2, exponent, exponent + 1, reference.NAN[dtype]]
    magnitudes += [reference.NAN[dtype] + 5, one, one - 1, one + 1, one + 2, one - 2]
    kind = reference.BITS[dtype]
    sign = 1 << (8 * np.dtype(kind).itemsize - 1)
    return np.array([m | s for m in magnitudes for s in (0, sign)], dtype=kind)


def nasty_bits(dtype: str, n: int, seed: int = 0) -> Bits:
    """`n` weights: special values, raw bit patterns, norm gains near 1, and plain small weights."""
    rng = np.random.default_rng([seed, n])
    quarter = n // 4
    kind = reference.BITS[dtype]
    raw = rng.integers(0, np.iinfo(kind).max, quarter, dtype=kind, endpoint=True)
    gains = 1 + rng.normal(0, 0.01, quarter)
    plain = rng.normal(0, 0.03, n)
    values = reference.nearest(np.concatenate([gains, plain]).astype(np.float32), dtype)
    out = np.concatenate([special_bits(dtype), raw, values])
    if out.size > n:
        out = out[:n] if n < 40 else np.concatenate([out[: 3 * n // 4], out[-(n - 3 * n // 4) :]])
    return rng.permutation(out)


def plain_bits(dtype: str, n: int, seed: int = 0) -> Bits:
    """`n` weights with the spread of a trained layer: normal, 0.03, with a heavier tail."""
    rng = np.random.default_rng([seed, n, 1])
    value = rng.normal(0, 0.03, n) * np.exp(rng.normal(0, 0.5, n))
    return reference.nearest(value.astype(np.float32), dtype)


SHAPES = {
    "model.embed_tokens.weight": (37, 29),
    "model.layers.0.mlp.up_proj.weight": (5, 3, 7),
    "model.norm.weight": (61,),
    "model.scale": (1,),
    "model.empty": (0, 4),
}
Maker = Callable[[str, int, int], Bits]


def tensors(dtype: str, make: Maker = nasty_bits, seed: int = 0) -> dict[str, torch.Tensor]:
    """A small model: five tensors of odd sizes, one of them empty."""
    out = {}
    for k, (name, shape) in enumerate(SHAPES.items()):
        n = int(np.prod(shape))
        out[name] = tensor_of(make(dtype, n, seed * 100 + k), dtype, shape)
    return out


def population(noise: str, size: int, antithetic: bool = False, seed: int = 77) -> list[Member]:
    """Members as a strategy makes them: own seeds, or one seed and indices for Hadamard."""
    out = []
    for n in range(size):
        draw = n // 2 if antithetic else n
        sign = 1 - 2 * (n % 2) if antithetic else 1
        shared = noise == "hadamard"
        own = reference.member_seed(seed, 3, reference.GENERATION if shared else draw)
        out.append(Member(seed=own, sign=sign, noise=noise, index=draw if shared else 0))
    return out


def coefficients(size: int, scale: float = 1e-3, seed: int = 5) -> list[float]:
    return [float(c) for c in np.random.default_rng(seed).normal(0, scale, size)]


def indices(shape: Iterable[int]) -> Any:
    return np.arange(int(np.prod(tuple(shape))), dtype=np.uint64)


def expected_perturb(
    tensors: dict[str, torch.Tensor], member: Member, sigma: float
) -> dict[str, Bits]:
    """What the reference says that a member's weights are."""
    return {
        name: reference.perturb(bits_of(w), dtype_of(w), name, indices(w.shape), member, sigma)
        for name, w in tensors.items()
    }


def expected_update(
    tensors: dict[str, torch.Tensor],
    update: reference.Update,
    anchors: dict[str, torch.Tensor] | None = None,
) -> tuple[dict[str, Bits], int]:
    """What the reference says that the updated weights are, and how many saturated."""
    out, saturated = {}, 0
    for name, w in tensors.items():
        a = anchors[name] if anchors else w
        anchor = reference.widen(bits_of(a), dtype_of(a))
        bits, count = update.apply(bits_of(w), dtype_of(w), name, indices(w.shape), anchor)
        out[name], saturated = bits, saturated + count
    return out, saturated


def clones(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_tensors(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor] | dict[str, Bits], what: str = ""
) -> None:
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert_bits(tensor, want[name], f"{what} {name}")


def made(model: dict[str, torch.Tensor], memory: str, **options: Any) -> Weights:
    return Weights(ParameterTable.from_tensors(model), memory=memory, **options)


def member(noise: str, sign: int = 1) -> Member:
    return Member(seed=0x1234567890ABCDEF, sign=sign, noise=noise, index=37 * (noise[0] == "h"))
