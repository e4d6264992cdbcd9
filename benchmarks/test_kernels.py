"""pytest-benchmark suites: every kernel, dtype, noise and memory mode, with its peers beside it.

    pytest benchmarks [--full] [-k "update and bfloat16"]

A group is one kernel and dtype, so that the table printed for it has the torch loop and the
read-modify-write limit in it. `extra_info` holds ns a parameter. benchmarks/kernels.py interleaves
the same variants and is what the committed results come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peers
import pytest
import torch
import workload
from workload import Bench, Case

THREADS = 2


@pytest.fixture(scope="module", params=workload.DTYPES)
def bench(request: pytest.FixtureRequest, size: tuple[int, int]) -> Iterator[Bench]:
    """The weights of one dtype; pytest runs all of a dtype's tests together."""
    torch.set_num_threads(THREADS)
    yield Bench(request.param, size, THREADS)


def record(
    benchmark: Any,
    group: str,
    parameters: int,
    run: Callable[[], object],
    setup: Callable[[], object] = lambda: None,
) -> None:
    benchmark.group = group
    benchmark.pedantic(run, setup=lambda: setup() and None, rounds=3, warmup_rounds=1)
    benchmark.extra_info["ns_per_parameter"] = benchmark.stats.stats.median * 1e9 / parameters


def dtype_of(bench: Bench) -> str:
    return str(bench.live()[0].dtype).removeprefix("torch.")


@pytest.mark.parametrize("memory", workload.MEMORIES)
@pytest.mark.parametrize("noise", workload.NOISES)
def test_perturb(benchmark: Any, bench: Bench, noise: str, memory: str) -> None:
    weights, member = bench.weights(memory), workload.members(noise, 1)[0]
    record(
        benchmark,
        f"perturb {dtype_of(bench)}",
        bench.parameters,
        lambda: weights.perturb(member, workload.SIGMA),
        weights.restore,
    )
    weights.restore()


@pytest.mark.parametrize("memory", workload.MEMORIES)
@pytest.mark.parametrize("noise", workload.NOISES)
def test_restore(benchmark: Any, bench: Bench, noise: str, memory: str) -> None:
    weights, member = bench.weights(memory), workload.members(noise, 1)[0]
    record(
        benchmark,
        f"restore {dtype_of(bench)}",
        bench.parameters,
        weights.restore,
        lambda: weights.perturb(member, workload.SIGMA),
    )


@pytest.mark.parametrize("memory", workload.MEMORIES)
@pytest.mark.parametrize(
    ("noise", "population"), [(n, p) for n in workload.NOISES for p in workload.POPULATIONS[n]]
)
def test_update(benchmark: Any, bench: Bench, noise: str, population: int, memory: str) -> None:
    case = Case("update", noise, dtype_of(bench), memory, population)
    run = workload.passes(case, bench.weights(memory))
    record(benchmark, f"update {dtype_of(bench)}", bench.parameters, run)


@pytest.mark.parametrize("kernel", ["perturb", "restore"])
def test_torch_perturb(benchmark: Any, bench: Bench, kernel: str) -> None:
    """The restore of the torch loops is the perturbation with the other sign."""
    live, sigma = bench.live(), workload.SIGMA if kernel == "perturb" else -workload.SIGMA
    group = f"{kernel} {dtype_of(bench)}"
    record(benchmark, group, bench.parameters, lambda: peers.perturb(live, 1, sigma))


@pytest.mark.parametrize("population", [8, 30, 128])
def test_torch_update(benchmark: Any, bench: Bench, population: int) -> None:
    """On one layer: 128 members over the whole table would take a minute a round."""
    small = list(workload.tensors(dtype_of(bench), workload.ONE_LAYER).values())
    scalars = workload.coefficients(population)
    record(
        benchmark,
        f"update {dtype_of(bench)}",
        sum(tensor.numel() for tensor in small),
        lambda: peers.update(small, range(population), scalars),
    )


@pytest.mark.parametrize("kernel", ["perturb", "restore", "update"])
def test_read_modify_write(benchmark: Any, bench: Bench, kernel: str) -> None:
    """The limit, once in each group."""
    buffer = bench.buffer()
    group = f"{kernel} {dtype_of(bench)}"
    record(benchmark, group, bench.parameters, lambda: peers.read_modify_write(buffer))
