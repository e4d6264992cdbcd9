"""The second implementation of docs/noise.md (version 1): numpy only, slow, element by element.

Every random number, perturbation and update that touches a weight, computed from the text of the
specification, and the checksum that journals name; it shares no code with csrc/. Weights travel as
their bits (uint16 or uint32), so that -0, subnormals and NaN payloads are compared too. fp32 `fma`
is emulated exactly: a product of two fp32 is exact in float64, and the sum is rounded to odd there,
which makes the second rounding to fp32 innocent (Boldo and Melquiond, 53 >= 2 * 24 + 2).

It promises nothing about speed: about 1 us an element and member. A `member` is anything with
`seed`, `sign`, `noise` and `index`; `i` is a uint64 array of logical element indices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U64 = NDArray[Any]  # uint64; numpy 2 types its shifts as signed
Bits = NDArray[Any]

LOW = np.uint64(0xFFFFFFFF)
DENSE, ROUNDING, SEEDS = 0, 1, 4  # stream purposes
GENERATION = 0xFFFFFFFF  # the "member" whose seed is the generation's own

L = "-0x1p+1 0x1.000056p+0 -0x1.554d14p-1 0x1.ff7a56p-2 -0x1.9b7f1ap-2 0x1.6416b4p-2"
L += " -0x1.24a914p-2 0x1.179f26p-3"
S = "0x1.921f5cp+0 -0x1.4ab278p-1 0x1.455cf2p-4 -0x1.1bf944p-8"
K = "0x1.fffffep-1 -0x1.3bd3a6p+0 0x1.03bd06p-2 -0x1.54f61cp-6 0x1.c1f086p-11"
HADAMARD_SCALE = np.float32(float.fromhex("0x1.6a09e6p-3"))
DIGITS = 127 * 128  # two int8 digits hold a Hadamard update's integer coefficient

BITS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
NAN = {"float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FC0}
INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}


@dataclass(frozen=True)
class Term:
    """One draw of the update: a member's noise without its sign, and its merged coefficient."""

    member: Any
    coefficient: np.float32


# ---- generator ---------------------------------------------------------------------------------


def philox(key: int, counter: Sequence[Any]) -> tuple[U64, U64, U64, U64]:
    """Philox4x32-10: four 32-bit words (in uint64) for a u64 key and four counter words."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & LOW, (p0 >> 32) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & LOW, (k1 + np.uint64(0xBB67AE85)) & LOW
    return c0, c1, c2, c3


def tensor_id(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:4], "little")


def member_seed(run_seed: int, generation: int, member: int) -> int:
    counter = (generation & 0xFFFFFFFF, generation >> 32, member, SEEDS << 24)
    x = philox(run_seed, counter)
    return int(x[0]) | int(x[1]) << 32


def generation_seed(run_seed: int, generation: int) -> int:
    return member_seed(run_seed, generation, GENERATION)


def words(seed: int, name: str, block: U64, stream: int) -> NDArray[np.uint64]:
    """The four words of each block, shape [4, len(block)]."""
    return np.stack(philox(seed, (block & LOW, block >> 32, *_constant(block, name, stream))))


def _constant(block: U64, name: str, stream: int) -> tuple[U64, U64]:
    return np.full_like(block, tensor_id(name)), np.full_like(block, stream)


def pick(x: NDArray[np.uint64], which: U64) -> U64:
    return np.take_along_axis(x, which[None].astype(np.intp), axis=0)[0]


# ---- fp32 arithmetic ---------------------------------------------------------------------------


def fma(a: Any, b: Any, c: Any) -> F32:
    """round(a * b + c), once, to nearest even, in fp32."""
    with np.errstate(all="ignore"):
        p = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32)
        p, c = np.broadcast_arrays(p, np.asarray(c, np.float32).astype(np.float64))
        s = np.array(p + c)
        z = s - p
        error = (p - (s - z)) + (c - z)  # Knuth's two-sum: p + c == s + error
        inexact = np.isfinite(error) & (error != 0) & np.isfinite(s)
        bits = s.view(np.int64)
        step = np.where((error > 0) == (s > 0), 1, -1)
        bits += np.where(inexact & ((bits & 1) == 0), step, 0)  # to odd
        return s.astype(np.float32)


def horner(coefficients: str, x: F32) -> F32:
    values = [np.float32(float.fromhex(c)) for c in coefficients.split()]
    out = np.full_like(x, values[-1])
    for value in reversed(values[:-1]):
        out = fma(out, x, value)
    return out


def signed(x: U64) -> NDArray[np.int32]:
    return x.astype(np.uint32).view(np.int32)


# ---- the distributions -------------------------------------------------------------------------


def box_muller(x0: U64, x1: U64) -> tuple[F32, F32]:
    """Two normals from two words, as the specification writes the map."""
    f = signed(x0 | np.uint64(1)).astype(np.float32)
    b = np.abs(f).view(np.uint32)
    e = (b - np.uint32(0x4EC00000)) & np.uint32(0xFF800000)
    m = fma((b - e).view(np.float32), np.float32(2.0**-31), np.float32(-1))
    c = np.float32(-2 * math.log(2) / 2**23)
    t = fma(m, horner(L, m), e.view(np.int32).astype(np.float32) * c)
    r = np.sqrt(t)
    s = signed(x1).astype(np.float32) * np.float32(2.0**-31)
    z0 = r * horner(K, s * s)
    z0 = np.where(x0 >> 31 == 1, -z0, z0)
    return z0, r * (s * horner(S, s * s))


def gaussian(seed: int, name: str, i: U64) -> F32:
    x = words(seed, name, i >> 2, DENSE << 24)
    upper = (i & 2) != 0
    z0, z1 = box_muller(np.where(upper, x[2], x[0]), np.where(upper, x[3], x[1]))
    return np.where(i & 1 != 0, z1, z0).astype(np.float32)


def rademacher(seed: int, name: str, i: U64) -> F32:
    word = pick(words(seed, name, i >> 7, DENSE << 24), (i >> 5) & 3)
    return (1 - 2 * ((word >> (i & 31)) & 1).astype(np.int64)).astype(np.float32)


def popcount(x: U64) -> NDArray[np.int64]:
    return np.bitwise_count(x).astype(np.int64)


def hadamard_row(n: int) -> int:
    """h_n: bit k is the parity of popcount(n & k)."""
    return sum((bin(n & k).count("1") & 1) << k for k in range(32))


def hadamard_word(seed: int, name: str, i: U64, group: int) -> U64:
    return pick(words(seed, name, i >> 2, DENSE << 24 | group), i & 3)


def hadamard(seed: int, name: str, member: int, i: U64) -> F32:
    word = hadamard_word(seed, name, i, member // 32)
    counts = 32 - 2 * popcount(word ^ np.uint64(hadamard_row(member % 32)))
    return counts.astype(np.float32) * HADAMARD_SCALE


def epsilon(member: Any, name: str, i: Any) -> F32:
    """The member's noise without its sign."""
    i = np.asarray(i, dtype=np.uint64)
    if member.noise == "hadamard":
        return hadamard(member.seed, name, member.index, i)
    draw: Callable[[int, str, U64], F32] = {"gaussian": gaussian, "rademacher": rademacher}[
        member.noise
    ]
    return draw(member.seed, name, i)


def rounding_bits(seed: int, name: str, i: Any) -> U64:
    """Sixteen random bits an element, for stochastic rounding."""
    i = np.asarray(i, dtype=np.uint64)
    word = pick(words(seed, name, i >> 3, ROUNDING << 24), (i >> 1) & 3)
    return np.where(i & 1 != 0, word >> 16, word & 0xFFFF)


# ---- dtypes and roundings ----------------------------------------------------------------------


def widen(bits: Bits, dtype: str) -> F32:
    """The fp32 value of each weight; exact."""
    if dtype == "float32":
        return bits.view(np.float32)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def canonical_nan(bits: Bits, value: F32, dtype: str) -> Bits:
    return np.where(np.isnan(value), BITS[dtype](NAN[dtype]), bits).astype(BITS[dtype])


def nearest(value: F32, dtype: str) -> Bits:
    """IEEE rounding to nearest even; overflow gives infinity, any NaN the canonical one."""
    raw = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    if dtype == "bfloat16":
        wide = raw.astype(np.uint64)
        raw = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    elif dtype == "float16":
        with np.errstate(over="ignore", invalid="ignore"):
            raw = value.astype(np.float16).view(np.uint16)
    return canonical_nan(raw, value, dtype)


def stochastic(value: F32, r: U64, dtype: str) -> tuple[Bits, int]:
    """Stochastic rounding with the elements' 16 bits `r`, and how many finite values saturated."""
    if dtype == "float32":
        return nearest(value, dtype), 0
    value = np.ascontiguousarray(value, dtype=np.float32)
    raw = value.view(np.uint32).astype(np.uint64)
    magnitude = raw & 0x7FFFFFFF
    kept = _kept_bfloat16(magnitude, r) if dtype == "bfloat16" else _kept_float16(value, r)
    over = np.isfinite(value) & (kept >= INFINITY[dtype])
    kept = np.where(over, INFINITY[dtype] - 1, kept)
    kept = np.where(np.isinf(value), INFINITY[dtype], kept)
    bits = (kept | (raw >> 31) << 15).astype(np.uint16)
    return canonical_nan(bits, value, dtype), int(over.sum())


def _kept_bfloat16(magnitude: U64, r: U64) -> U64:
    return (magnitude + r) >> 16


def _kept_float16(value: F32, r: U64) -> U64:
    size = np.abs(value)
    normal = ((size.view(np.uint32).astype(np.int64) + (r >> 3).astype(np.int64)) >> 13) - (
        112 << 10
    )
    small = np.where(size < 2.0**-14, size, np.float32(0)).astype(np.float64)
    subnormal = (np.trunc(small * 2.0**40).astype(np.int64) + r.astype(np.int64)) >> 16
    return np.where(size < 2.0**-14, subnormal, normal).astype(np.int64).astype(np.uint64)


# ---- what happens to a weight ------------------------------------------------------------------


def perturb(bits: Bits, dtype: str, name: str, i: Any, member: Any, sigma: float) -> Bits:
    """live = round(w + sign * sigma * epsilon), to nearest."""
    scale = np.float32(member.sign) * np.float32(sigma)
    return nearest(fma(epsilon(member, name, i), scale, widen(bits, dtype)), dtype)


def merged_terms(members: Sequence[Any], coefficients: Sequence[float]) -> list[Term]:
    """Neighbours with one seed (and Hadamard index) are one term, summed in double."""
    sums: list[tuple[Any, float]] = []
    for member, coefficient in zip(members, coefficients, strict=True):
        value = member.sign * float(coefficient)
        if sums and _same_noise(sums[-1][0], member):
            sums[-1] = (sums[-1][0], sums[-1][1] + value)
        else:
            sums.append((member, value))
    return [Term(member, np.float32(total)) for member, total in sums]


def _same_noise(a: Any, b: Any) -> bool:
    return bool(a.seed == b.seed and a.noise == b.noise and a.index == b.index)


def step(terms: Sequence[Term], name: str, i: Any) -> F32:
    """acc of the update: the population's coefficients times its noise."""
    i = np.asarray(i, dtype=np.uint64)
    if terms and terms[0].member.noise == "hadamard":
        return hadamard_step(terms, name, i)
    acc = np.zeros(i.shape, np.float32)
    for term in terms:
        acc = fma(epsilon(term.member, name, i), term.coefficient, acc)
    return acc


def hadamard_step(terms: Sequence[Term], name: str, i: U64) -> F32:
    groups = sorted({term.member.index // 32 for term in terms})
    g = {group: _group_spectrum(terms, group) for group in groups}
    q = max(float(np.abs(values).max()) for values in g.values())
    if q == 0:
        return np.zeros(i.shape, np.float32)
    total = np.zeros(i.shape, np.int64)
    for group, values in g.items():
        integers = np.rint(values / q * DIGITS).astype(np.int64)
        word = hadamard_word(terms[0].member.seed, name, i, group)
        for k in range(32):
            total += integers[k] * (1 - 2 * ((word >> np.uint64(k)) & 1).astype(np.int64))
    assert np.abs(total).max(initial=0) < 2**31, "the specification promises an int32 sum"
    return total.astype(np.float32) * np.float32(q / DIGITS)


def _group_spectrum(terms: Sequence[Term], group: int) -> NDArray[np.float64]:
    """G_k of one group: members in ascending order, in double."""
    out = np.zeros(32)
    for term in sorted(terms, key=lambda term: int(term.member.index)):
        if term.member.index // 32 != group:
            continue
        row = hadamard_row(term.member.index % 32)
        for k in range(32):
            out[k] += float(term.coefficient) * (1 - 2 * (row >> k & 1))
    return out / math.sqrt(32)


def decayed(t: F32, anchor: F32, kind: str, strength: float) -> F32:
    """Anchored decay of `t` towards `anchor`; strength = alpha * lambda."""
    d = t - anchor
    if kind == "l2":
        return fma(np.float32(1 - strength), d, anchor)
    assert kind == "l1", kind
    kept = np.maximum(np.abs(d) - np.float32(strength), np.float32(0))
    return (anchor + np.copysign(kept, d)).astype(np.float32)


@dataclass(frozen=True)
class Update:
    """What Weights.update is given. `decay` is None, or (kind, alpha * lambda)."""

    members: Sequence[Any]
    coefficients: Sequence[float]
    decay: tuple[str, float] | None = None
    rounding: str = "stochastic"
    seed: int = 0

    def wide(self, w: F32, name: str, i: Any, anchor: F32 | None = None) -> F32:
        """The new weight in fp32, before its one rounding."""
        with np.errstate(all="ignore"):
            t = w + step(merged_terms(self.members, self.coefficients), name, i)
            if self.decay is None:
                return t
            assert anchor is not None
            return decayed(t, anchor, *self.decay)

    def apply(
        self, bits: Bits, dtype: str, name: str, i: Any, anchor: F32 | None = None
    ) -> tuple[Bits, int]:
        """The new weights' bits and the count of saturated elements."""
        out = self.wide(widen(bits, dtype), name, i, anchor)
        if self.rounding == "nearest":
            return nearest(out, dtype), 0
        assert self.rounding == "stochastic", self.rounding
        return stochastic(out, rounding_bits(self.seed, name, i), dtype)


# ---- checksum ----------------------------------------------------------------------------------


def checksum(bits: Bits, name: str, i: Any) -> int:
    """Philox2x32-7 of (low word of i, bits), key = tensor id xor w * high word; modulo 2^64."""
    i, w = np.asarray(i, dtype=np.uint64), np.uint64(0x9E3779B9)
    x, y = i & LOW, bits.astype(np.uint64)
    key = np.uint64(tensor_id(name)) ^ ((i >> 32) * w & LOW)
    for r in range(7):
        p = x * np.uint64(0xD256D193)
        x, y = (p >> 32) ^ y ^ ((key + np.uint64(r) * w) & LOW), p & LOW
    return int((x << 32 | y).sum(dtype=np.uint64))
