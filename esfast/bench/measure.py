"""Interleaved rounds: each runs every variant, and a variant's figure is the median of them.

First the device's limits: copy, read-modify-write and read over buffers, and the rate at which the
noise itself can be made: perturb and update over a table that stays in the cache. Of a limit the
fastest call counts, three a round: what once went that fast can go that fast. Then torch's loops,
then the cases. One round before is not measured; it touches all pages. What it does not do: pin
threads, or wait for a quiet machine.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from esfast import ParameterTable, Weights, _core
from esfast.bench import peers, workload
from esfast.bench.workload import (
    BUFFER,
    CACHE,
    CYCLE,
    DTYPES,
    KERNELS,
    SIGMA,
    TORCH,
    UPDATE,
    Bench,
    Case,
)

# A table of so many parameters a thread, or on a whole GPU, stays in the cache (bf16, two copies:
# 32 MiB of an A100's 40, an H100's 50 or an H200's 60).
CACHED = {"cpu": 1 << 21, "cuda": 1 << 23}
LIMIT_CALLS = 3  # a round
# Large enough that the weights' own pass does not count, and over that table long enough that
# starting threads and naming the members (0.5 ms for 1,024) is under a twentieth of the time: 1,024
# Hadamard members are 32 words a weight.
CACHED_POPULATION = {"gaussian": 128, "rademacher": 512, "hadamard": 1024}


@dataclass(frozen=True)
class Variant:
    """`run` gives seconds by kernel, for this many parameters."""

    case: Case
    parameters: int
    run: Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Timing:
    """Seconds of one kernel over `parameters` parameters: the median, of a limit the least."""

    case: Case
    kernel: str
    parameters: int
    seconds: float


def variants(bench: Bench, cases: Sequence[Case]) -> list[Variant]:
    """The limits, the peers that the cases need, and the cases, in the order of a round."""
    out = list(_buffers(bench))
    noisy = [case for case in cases if case.noise != "none"]
    for target, noise in dict.fromkeys((case.target, case.noise) for case in noisy):
        out += _cached(bench, target, noise)
    if any(case.kernel == CYCLE for case in cases):
        out.append(_torch_cycle(bench))
    populations = {peer_of(case).population for case in cases if case.kernel == UPDATE}
    part = bench.part() if populations else []
    out += [_torch_update(bench, part, population) for population in sorted(populations)]
    return out + [_ours(bench, case) for case in cases]


def measure(
    chosen: Sequence[Variant], rounds: int, advance: Callable[[str], None] = lambda name: None
) -> list[Timing]:
    """Timings over `rounds` rounds. `advance` is told the name of what comes next."""
    before = _core.target()
    samples: dict[tuple[Variant, str], list[float]] = defaultdict(list)
    try:
        for number in range(rounds + 1):
            for variant in chosen:
                advance(str(variant.case))
                for _ in range(LIMIT_CALLS if _is_limit(variant.case) else 1):
                    seconds = variant.run()
                    for kernel in seconds if number else ():
                        samples[variant, kernel].append(seconds[kernel])
    finally:
        _core.set_target(before)
    return [
        Timing(variant.case, kernel, variant.parameters, _figure(variant.case, values))
        for (variant, kernel), values in samples.items()
    ]


def _is_limit(case: Case) -> bool:
    return case.memory in (BUFFER, CACHE)


def _figure(case: Case, seconds: Sequence[float]) -> float:
    return min(seconds) if _is_limit(case) else statistics.median(seconds)


def peer_of(case: Case) -> Case:
    """The torch loop that a case is compared with: always Gaussian, as published, and at
    population 30 for a full Hadamard group of 32."""
    population = 30 if (case.noise, case.population) == ("hadamard", 32) else case.population
    return replace(case, noise="gaussian", memory=TORCH, population=population, target=TORCH)


def _timed(calls: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    timer = workload.timer(device)
    seconds = {kernel: timer(call) for kernel, call in calls.items()}
    if "perturb" in seconds and "restore" in seconds:
        seconds[CYCLE] = seconds["perturb"] + seconds["restore"]
    return {kernel: seconds[kernel] for kernel in sorted(seconds, key=_order)}


def _order(kernel: str) -> int:
    return KERNELS.index(kernel) if kernel in KERNELS else len(KERNELS)


def _variant(case: Case, parameters: int, calls: dict[str, Callable[[], object]]) -> Variant:
    def run() -> dict[str, float]:
        if case.target in _core.targets():
            _core.set_target(case.target)
        return _timed(calls, case.device)

    return Variant(case, parameters, run)


def _ours(bench: Bench, case: Case) -> Variant:
    weights = bench.weights(case.memory)
    return _variant(case, bench.parameters, workload.passes(case, weights))


def _buffers(bench: Bench) -> Iterator[Variant]:
    source, destination = bench.buffer(), bench.buffer()
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: peers.copy(source, destination),
        "read-modify-write": lambda: peers.read_modify_write(destination),
        "read": lambda: peers.read(source),
    }
    parameters = source.nbytes // DTYPES[bench.dtype].itemsize
    case = Case("bandwidth", "none", bench.dtype, BUFFER, device=bench.device)
    yield _variant(case, parameters, calls)


def _cached(bench: Bench, target: str, noise: str) -> Iterator[Variant]:
    """Perturb and update where memory costs next to nothing."""
    kind = torch.device(bench.device).type
    parameters = CACHED[kind] * (bench.threads if kind == "cpu" else 1)
    for kernel, members in ((CYCLE, 1), (UPDATE, CACHED_POPULATION[noise])):
        tensor = torch.zeros(parameters, dtype=torch.bfloat16, device=bench.device)
        table = ParameterTable.from_tensors({"cached": tensor})
        weights = Weights(table, memory="shadow", threads=bench.threads)
        case = Case(kernel, noise, bench.dtype, CACHE, members, target, bench.device)
        calls = workload.passes(case, weights)
        yield _variant(case, parameters, {kernel: calls[kernel] for kernel in list(calls)[:1]})


def _torch_cycle(bench: Bench) -> Variant:
    """On the very tensors of the cases; that a restore by subtraction drifts costs no time."""
    live = bench.live()
    case = Case(CYCLE, "gaussian", bench.dtype, TORCH, device=bench.device)
    calls: dict[str, Callable[[], object]] = {
        "perturb": lambda: peers.perturb(live, 1, SIGMA),
        "restore": lambda: peers.perturb(live, 1, -SIGMA),
    }
    return _variant(case, bench.parameters, calls)


def _torch_update(bench: Bench, part: Sequence[torch.Tensor], population: int) -> Variant:
    scalars = workload.coefficients(population)
    case = Case(UPDATE, "gaussian", bench.dtype, TORCH, population, device=bench.device)
    parameters = sum(tensor.numel() for tensor in part)
    return _variant(
        case, parameters, {UPDATE: lambda: peers.update(part, range(population), scalars)}
    )
