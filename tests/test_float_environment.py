"""What the caller set its floats to: another rounding, flushed subnormals. No bit may change."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import pytest
import torch
from cases import NOISES, assert_tensors, clones, made, member, population, tensors

from esfast.members import noise
from esfast.shaping import METHODS, shape

UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())


@contextmanager
def upward() -> Iterator[None]:
    libm = ctypes.CDLL("libm.so.6")
    assert libm.fesetround(UPWARD) == 0
    try:
        yield
        assert libm.fegetround() == UPWARD, "the core kept its own rounding"
    finally:
        libm.fesetround(0)


@contextmanager
def flushed() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.skipif(
    UPWARD is None or platform.system() != "Linux", reason="how to round upward is not known here"
)
@pytest.mark.parametrize("kind", NOISES)
def test_rounding_upward_outside_changes_nothing(target: str, kind: str) -> None:
    def walk(floats: AbstractContextManager[None]) -> tuple[np.ndarray, ...]:
        model = tensors("bfloat16")
        weights = made(model, "lean", threads=2)
        with floats:
            drawn = noise(member(kind), "w", (999,))
            weights.perturb(member(kind), 0.1)
            live = clones(model)
            weights.restore()
            weights.update(population(kind, 3), [0.1, 0.2, 0.3], seed=4)
        return drawn, live, model

    (drawn, live, model), want = walk(upward()), walk(nullcontext())
    assert np.array_equal(drawn, want[0])
    assert_tensors(live, want[1], "perturbed")
    assert_tensors(model, want[2], "updated")


@pytest.mark.parametrize("method", METHODS)
def test_flushing_denormals_outside_shapes_the_same(method: str) -> None:
    rewards = np.random.default_rng(1).normal(size=(30, 4)) * 1e-310
    given = rewards if method == "group_centered" else rewards[:, 0]
    want = shape(given, method)
    with flushed():
        got = shape(given, method)
    assert got.tobytes() == want.tobytes() and got.any()
