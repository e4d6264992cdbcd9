"""pytest-benchmark suites: every kernel, dtype, noise and memory mode, with its peers beside it.

    pytest benchmarks [--full] [-k "update and bfloat16"]

A group is one kernel and dtype, so that the table printed for it has the torch loop and the
read-modify-write limit in it. `extra_info` holds ns a parameter. `esfast bench` interleaves
the same variants and is what the committed results come from (benchmarks/kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from esfast.bench import peers, workload
from esfast.bench.workload import Bench, Shapes
from esfast.members import NOISES
from esfast.weights import MEMORIES

THREADS = 2
POPULATIONS = {"gaussian": (8, 30, 128), "rademacher": (8, 30, 128), "hadamard": (8, 32, 128)}


@pytest.fixture(scope="module", params=tuple(workload.DTYPES))
def bench(request: pytest.FixtureRequest, shapes: Shapes) -> Iterator[Bench]:
    """The weights of one dtype; pytest runs all of a dtype's tests together."""
    torch.set_num_threads(THREADS)
    yield Bench(shapes, request.param, THREADS)


def record(
    benchmark: Any,
    group: str,
    parameters: int,
    run: Callable[[], object],
    setup: Callable[[], object] = lambda: None,
) -> None:
    benchmark.group = group
    benchmark.pedantic(run, setup=lambda: setup() and None, rounds=3, warmup_rounds=1)
    if benchmark.stats:  # none under --benchmark-disable
        benchmark.extra_info["ns_per_parameter"] = benchmark.stats.stats.median * 1e9 / parameters


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("noise", NOISES)
def test_perturb(benchmark: Any, bench: Bench, noise: str, memory: str) -> None:
    weights, member = bench.weights(memory), workload.members(noise, 1)[0]
    record(
        benchmark,
        f"perturb {bench.dtype}",
        bench.parameters,
        lambda: weights.perturb(member, workload.SIGMA),
        weights.restore,
    )
    weights.restore()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("noise", NOISES)
def test_restore(benchmark: Any, bench: Bench, noise: str, memory: str) -> None:
    weights, member = bench.weights(memory), workload.members(noise, 1)[0]
    record(
        benchmark,
        f"restore {bench.dtype}",
        bench.parameters,
        weights.restore,
        lambda: weights.perturb(member, workload.SIGMA),
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("noise", NOISES)
def test_exchange(benchmark: Any, bench: Bench, noise: str, sign: int) -> None:
    """Of a member for another's noise, or for its own mirrored, in lean memory."""
    weights, (first, second) = bench.weights("lean"), workload.members(noise, 2)
    member = second if sign > 0 else replace(first, sign=-1)
    record(
        benchmark,
        f"{workload.EXCHANGE if sign > 0 else workload.MIRROR} {bench.dtype}",
        bench.parameters,
        lambda: weights.perturb(member, workload.SIGMA),
        lambda: weights.perturb(first, workload.SIGMA),
    )
    weights.restore()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(("noise", "population"), [(n, p) for n in NOISES for p in POPULATIONS[n]])
def test_update(benchmark: Any, bench: Bench, noise: str, population: int, memory: str) -> None:
    weights, members = bench.weights(memory), workload.members(noise, population)
    scalars = workload.coefficients(population)
    record(
        benchmark,
        f"update {bench.dtype}",
        bench.parameters,
        lambda: weights.update(members, scalars, seed=7),
    )


@pytest.mark.parametrize("kernel", ["perturb", "restore"])
def test_torch_perturb(benchmark: Any, bench: Bench, kernel: str) -> None:
    """The restore of the torch loops is the perturbation with the other sign."""
    live, sigma = bench.live(), workload.SIGMA if kernel == "perturb" else -workload.SIGMA
    group = f"{kernel} {bench.dtype}"
    record(benchmark, group, bench.parameters, lambda: peers.perturb(live, 1, sigma))


@pytest.mark.parametrize("population", [8, 30, 128])
def test_torch_update(benchmark: Any, bench: Bench, population: int) -> None:
    """On a sixteenth: 128 members over the whole table would take two minutes a round."""
    part = bench.part()
    scalars = workload.coefficients(population)
    record(
        benchmark,
        f"update {bench.dtype}",
        sum(tensor.numel() for tensor in part),
        lambda: peers.update(part, range(population), scalars),
    )


@pytest.mark.parametrize("kernel", ["perturb", "restore", "update"])
def test_read_modify_write(benchmark: Any, bench: Bench, kernel: str) -> None:
    """The limit, once in each group."""
    buffer = bench.buffer()
    group = f"{kernel} {bench.dtype}"
    record(benchmark, group, bench.parameters, lambda: peers.read_modify_write(buffer))
