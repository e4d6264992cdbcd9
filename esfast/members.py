"""Members of a population and their noise: a seed, a sign, a distribution (docs/noise.md).

    noise(seed, tensor, i) -> fp32

is one pure function of the member's seed, the canonical tensor name and the logical element index.
It is never stored; `noise` below shows it for a test or a plot.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from esfast import _core
from esfast.errors import ConfigError, require_one_of

NOISES = ("gaussian", "rademacher", "hadamard")
GENERATION_MEMBER = 0xFFFFFFFF  # the member number that derives a generation's own seed
MOST_MEMBERS = 32 * 4128  # Hadamard: 4128 groups of 32 keep the update's int32 sum exact


def whole(value: object) -> int | None:
    """An integer of any library as an int; None for anything else (True is no number)."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


@dataclass(frozen=True)
class Member:
    """One perturbation: weights + sign * sigma * noise(seed).

    seed: 0 .. 2^64 - 1. For Hadamard noise the *generation's* seed, shared by its members.
    sign: +1 or -1 (the halves of an antithetic pair share a seed).
    noise: "gaussian", "rademacher" or "hadamard".
    index: Hadamard only: the member's number, 0 .. 132,095; members of a group of 32 are exactly
        uncorrelated.
    """

    seed: int
    sign: int = 1
    noise: str = "gaussian"
    index: int = 0

    def __post_init__(self) -> None:
        seed, sign, index = whole(self.seed), whole(self.sign), whole(self.index)
        if seed is None or not 0 <= seed < 2**64:
            raise ConfigError(
                f"a member's seed is {self.seed!r}; it is an integer from 0 to 2**64 - 1."
            )
        if sign not in (1, -1):
            raise ConfigError(f"a member's sign is {self.sign!r}; it is +1 or -1.")
        require_one_of("noise", self.noise, NOISES)
        if index is None or not 0 <= index < MOST_MEMBERS:
            raise ConfigError(
                f"a member's index is {self.index!r}; it is an integer from 0 to "
                f"{MOST_MEMBERS - 1} (and only Hadamard noise uses it)."
            )
        for field, value in (("seed", seed), ("sign", sign), ("index", index)):
            object.__setattr__(self, field, value)  # a numpy integer is one too, JSON knows none

    @property
    def spec(self) -> _core.MemberSpec:
        """The core's view of this member."""
        return _core.MemberSpec(int(self.seed), self.sign, self.index)

    @property
    def noise_number(self) -> int:
        """The core's number of this member's distribution."""
        return NOISES.index(self.noise)


def require_member(value: object) -> Member:
    """`value`, a Member; ConfigError for anything else."""
    if not isinstance(value, Member):
        raise ConfigError(f"a member is {value!r}; make it with esfast.Member(seed, sign).")
    return value


def tensor_id(name: str) -> int:
    """The 32-bit id of a canonical tensor name: the first four bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:4], "little")


def member_seed(run_seed: int, generation: int, member: int) -> int:
    """The 64-bit seed of one member of one generation, derived by Philox, never drawn.

    run_seed, generation: 64 bits; member: 32. ConfigError for others.
    """
    numbers = {"run seed": (run_seed, 64), "generation": (generation, 64), "member": (member, 32)}
    for what, (value, bits) in numbers.items():
        number = whole(value)
        if number is None or not 0 <= number < 2**bits:
            raise ConfigError(f"the {what} is {value!r}; it is an integer from 0 to 2**{bits} - 1.")
    return int(_core.derive_seed(run_seed, generation, member))


def generation_seed(run_seed: int, generation: int) -> int:
    """The 64-bit seed of a generation: stochastic rounding and Hadamard noise are keyed by it."""
    return member_seed(run_seed, generation, GENERATION_MEMBER)


def noise(member: Member, name: str, shape: Sequence[int] | int, first: int = 0) -> np.ndarray:
    """A member's noise for a tensor, sign included.

    name: canonical tensor name; shape: of the result; first: logical (row-major) index of its first
    element. Returns float32 of `shape`, mean 0 and variance 1, bit-equal on every target.
    """
    given = shape if isinstance(shape, Sequence) else (shape,)
    dimensions, start = [whole(n) for n in given], whole(first)
    sizes = [n for n in dimensions if n is not None and n >= 0]
    if not isinstance(name, str):
        raise ConfigError(f"noise was asked for tensor {name!r}; give its canonical name.")
    known = len(sizes) == len(dimensions) and start is not None and 0 <= start < 2**64
    if start is None or not known or start + math.prod(sizes) > 2**64:
        raise ConfigError(
            f"noise was asked for shape {shape!r} from index {first!r}; both are whole numbers "
            "from 0 on, and indices end at 2**64."
        )
    spec, number, tensor = require_member(member).spec, member.noise_number, tensor_id(name)
    try:
        values = _core.reveal(number, spec, tensor, start, math.prod(sizes))
        return np.asarray(values).reshape(sizes)
    except ValueError as error:
        raise ConfigError(
            f"noise was asked for shape {shape!r}, which no numpy array has ({error}); give a part "
            "of it, with the index of its first element."
        ) from None
