"""The CUDA kernels whole, shells and launches included, on the CPU (native/simt/cuda_runtime.h).

tests/test_cuda_mapping.py takes the suite of the weights over them; here is what that does not
reach: shaping, tables that do not fit, many members, the device guard.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import NOISES, assert_bits, coefficients, plain_bits, population, tensor_of

from esfast import EsfastError, ParameterTable, Weights, device_table, shaping
from esfast.device_shaping import _NUMBERS
from esfast.members import Member

H200_LENDS = 232448  # bytes of shared memory


@pytest.fixture
def lent(emulator: Any) -> Iterator[Any]:
    yield emulator.lend
    emulator.lend(H200_LENDS)


# ---- the emulation itself ----------------------------------------------------------------------


def test_a_missing_barrier_shows(emulator: Any) -> None:
    for said in (100, 2000, 30000):
        heard = [said + (thread + 33) % 64 for thread in range(64)]
        assert emulator.neighbours(said, True) == heard
        assert emulator.neighbours(said + 1, False) != [word + 1 for word in heard]


def test_threads_that_wait_apart_are_an_error(emulator: Any) -> None:
    with pytest.raises(RuntimeError, match="gone"):
        emulator.part(True)
    with pytest.raises(RuntimeError, match="__s"):
        emulator.part(False)


# ---- shaping -----------------------------------------------------------------------------------


def shaped(emulator: Any, rewards: np.ndarray, method: str) -> np.ndarray:
    values = np.ascontiguousarray(rewards, dtype=np.float64)
    members, prompts = values.shape[0], values.shape[1] if values.ndim == 2 else 1
    room = np.full(emulator.cuda.shape_doubles(members, prompts), np.nan)
    fitness = np.full(members, np.nan)
    pointers = (values.ctypes.data, members, prompts, room.ctypes.data, fitness.ctypes.data)
    emulator.cuda.shape(_NUMBERS[method], 0, 0, *pointers)
    return fitness


def reward_sets(shape: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(shape))
    plain = rng.normal(size=shape)
    sets = [plain, rng.integers(0, 3, shape) * 0.1, np.full(shape, 0.3), np.zeros(shape)]
    largest = plain / abs(plain).max() * 1.7e308
    return [*sets, plain * 1e200, plain * 1e-200, plain * 1e-310, largest]


@pytest.mark.parametrize("count", [1, 2, 30, 255, 256, 257, 1000])
@pytest.mark.parametrize("method", [m for m in shaping.METHODS if m != "group_centered"])
def test_shaping_gives_the_bits_of_the_cpu(emulator: Any, method: str, count: int) -> None:
    for rewards in reward_sets((count,)):
        want = shaping.shape(rewards, method)
        assert shaped(emulator, rewards, method).tobytes() == want.tobytes(), rewards[:4]


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 5), (4, 4), (30, 200), (257, 33), (3, 300)])
def test_group_centered_gives_the_bits_of_the_cpu(emulator: Any, shape: tuple[int, int]) -> None:
    for rewards in [*reward_sets(shape), np.eye(*shape), np.eye(*shape) * 1e150]:
        want = shaping.shape(rewards, "group_centered")
        assert shaped(emulator, rewards, "group_centered").tobytes() == want.tobytes(), rewards[:2]


# ---- updates of every size ---------------------------------------------------------------------


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> tuple[Weights, Weights]:
    """The same weights on the CPU and on the emulated device."""
    bits = plain_bits("bfloat16", 9001)
    tables = [ParameterTable.from_tensors({"w": tensor_of(bits, "bfloat16")}) for _ in range(2)]
    host = Weights(tables[0])
    request.getfixturevalue("emulated")
    return host, Weights(tables[1])


def assert_pair(pair: tuple[Weights, Weights], what: str) -> None:
    host, device = (w.table.segments[0].tensor for w in pair)
    assert_bits(device, host, what)
    assert pair[0].checksum() == pair[1].checksum()


@pytest.mark.parametrize("size", [0, 1, 31, 33, 97, 241, 600, 2000])
@pytest.mark.parametrize("noise", NOISES)
def test_population_sizes(pair: tuple[Weights, Weights], noise: str, size: int) -> None:
    """Beyond one launch's parameters of members, and beyond what shared memory holds of tables."""
    for w in pair:
        w.update(population(noise, size), coefficients(size, 1e-3), seed=9)
    assert_pair(pair, f"{size} members")


@pytest.mark.parametrize("kilobytes", [2, 24, 40, 60, 100, 164, 227])
@pytest.mark.parametrize("size", [1, 32, 65, 300])
def test_tables_in_as_many_copies_as_fit(
    pair: tuple[Weights, Weights], lent: Any, size: int, kilobytes: int
) -> None:
    """From none in shared memory to one a bank; a smaller device would refuse the launch."""
    lent(1024 * kilobytes)
    device_table.driver().prepare(0)
    for w in pair:
        w.update(population("hadamard", size), coefficients(size, 1e-3), seed=size)
    assert_pair(pair, f"{size} members, {kilobytes} KB")


# ---- devices -----------------------------------------------------------------------------------


def test_the_current_device_is_put_back(emulator: Any) -> None:
    for chosen in (0, 1):
        emulator.choose_device(chosen)
        emulator.cuda.prepare(1)
        assert emulator.current_device() == chosen
    emulator.choose_device(0)


def test_every_call_works_on_the_device_of_its_table(emulator: Any) -> None:
    """Whichever is current: a kernel on the wrong one would read what is not there."""
    weights = torch.zeros(1000, dtype=torch.bfloat16)
    rows = ParameterTable.from_tensors({"w": weights}).rows()
    cuda, spans = emulator.cuda, emulator.cuda.plan(rows)
    room = np.zeros(1 << 16, dtype=np.uint64)
    at = room.ctypes.data
    place = cuda.Place(spans[0].ctypes.data, 1, spans[1], 1, 0)
    buffers = cuda.Buffers(at, at + 4096, at + 8192, at + 65536, 4096, 64)
    one = Member(3).spec
    calls = [lambda: cuda.capture(place), lambda: cuda.refresh(place)]
    calls += [lambda: cuda.checksum(place, at), lambda: cuda.shape(0, 1, 0, at, 9, 1, at, at)]
    for noise in range(len(NOISES)):
        people = cuda.Population(noise, [one] * 2, [0.1, 0.2])
        calls.append(lambda n=noise: cuda.perturb(place, n, one, 0.1))
        calls.append(lambda n=noise: cuda.record(place, n, one, 0.1, buffers, 1))
        calls.append(lambda n=noise: cuda.restore(place, n, one, 0.1, buffers))
        calls.append(lambda p=people: cuda.update(place, p, 0, 0.0, True, 5, at, at + 65536))
    cuda.prepare(1)
    emulator.worked()
    for call in calls:
        call()
        assert emulator.worked() == {1} and emulator.current_device() == 0


def test_a_device_that_is_not_there(emulator: Any) -> None:
    with pytest.raises(EsfastError, match="choosing the device: invalid device ordinal"):
        emulator.cuda.prepare(2)
    assert emulator.current_device() == 0
    assert len(emulator.cuda.devices()) == 2
