"""The weights and the passes that the benchmarks time.

The table has SmolLM2-135M's tensors (30 layers, 576 wide, tied embeddings of 49,152 rows) filled
with small normals; `layers` and `rows` shrink it. A `Case` names one pass; `passes` gives the
seconds of each kernel it runs. Traffic counts the bytes that a pass cannot avoid, so that
share_of_bandwidth says how far from the limit it is, not how busy the bus was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from esfast import Member, ParameterTable, Weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NOISES = ("gaussian", "rademacher", "hadamard")
MEMORIES = ("lean", "shadow", "master")
POPULATIONS = {"gaussian": (8, 30, 128), "rademacher": (8, 30, 128), "hadamard": (8, 32, 128)}
SIGMA = 1e-3
FULL = (30, 49152)  # layers and embedding rows of SmolLM2-135M: 134,515,008 parameters
SIXTEENTH = (2, 3072)  # a full-sized layer twice: what the slow peers run on
ONE_LAYER = (1, 768)


@dataclass(frozen=True)
class Case:
    """One thing to time; `kernel` is "cycle" (a perturb and its restore) or "update"."""

    kernel: str
    noise: str
    dtype: str
    memory: str
    population: int = 1
    target: str = ""

    def __str__(self) -> str:
        words = (self.kernel, self.noise, self.dtype, self.memory, str(self.population))
        return "-".join((*words, self.target) if self.target else words)


def shapes(layers: int, rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner, keys = 576, 1536, 192
    yield "model.embed_tokens.weight", (rows, width)
    yield "model.norm.weight", (width,)
    for n in range(layers):
        base = f"model.layers.{n}."
        yield base + "input_layernorm.weight", (width,)
        yield base + "post_attention_layernorm.weight", (width,)
        yield base + "self_attn.q_proj.weight", (width, width)
        yield base + "self_attn.k_proj.weight", (keys, width)
        yield base + "self_attn.v_proj.weight", (keys, width)
        yield base + "self_attn.o_proj.weight", (width, width)
        yield base + "mlp.gate_proj.weight", (inner, width)
        yield base + "mlp.up_proj.weight", (inner, width)
        yield base + "mlp.down_proj.weight", (width, inner)


def tensors(dtype: str, size: tuple[int, int] = FULL) -> dict[str, torch.Tensor]:
    """Normals of spread 0.03, norm gains of 1, in the dtype asked for."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, shape in shapes(*size):
        value = (
            torch.randn(shape, generator=generator) * 0.03 if len(shape) > 1 else torch.ones(shape)
        )
        out[name] = value.to(DTYPES[dtype])
    return out


def count(model: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in model.values())


def members(noise: str, population: int) -> list[Member]:
    """A generation; Hadamard members share a seed and differ in their index."""
    if noise == "hadamard":
        return [Member(seed=1, noise=noise, index=n) for n in range(population)]
    return [Member(seed=n + 1, noise=noise) for n in range(population)]


def coefficients(population: int) -> list[float]:
    """Small enough that a hundred updates leave the weights' scale alone."""
    return [1e-7 * ((-1) ** n) * (1 + n) for n in range(population)]


def cases(dtype: str) -> list[Case]:
    """Every pass of one dtype, on the target in force."""
    out = []
    for noise in NOISES:
        for memory in MEMORIES:
            out.append(Case("cycle", noise, dtype, memory))
            out += [Case("update", noise, dtype, memory, n) for n in POPULATIONS[noise]]
    return out


def traffic(kernel: str, dtype: str, memory: str) -> int:
    """Bytes a parameter that the kernel has to move."""
    live = DTYPES[dtype].itemsize
    base = {"lean": 0, "shadow": live, "master": 4}[memory]
    if kernel == "update":
        return 2 * base + live if base else 2 * live
    one_way = base + live if base else 2 * live
    return 2 * one_way if kernel == "perturb+restore" else one_way


def timed(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def passes(case: Case, weights: Weights) -> Callable[[], dict[str, float]]:
    """A closure that runs the case once and gives seconds by kernel name."""
    people, scalars = members(case.noise, case.population), coefficients(case.population)

    def cycle() -> dict[str, float]:
        there = timed(lambda: weights.perturb(people[0], SIGMA))
        back = timed(weights.restore)
        return {"perturb": there, "restore": back, "perturb+restore": there + back}

    def update() -> dict[str, float]:
        return {"update": timed(lambda: weights.update(people, scalars, seed=7))}

    return {"cycle": cycle, "update": update}[case.kernel]


class Bench:
    """The weights of one dtype, with one Weights a memory mode, built when first asked for."""

    def __init__(self, dtype: str, size: tuple[int, int], threads: int) -> None:
        self.model = tensors(dtype, size)
        self.parameters = count(self.model)
        self._threads = threads
        self._weights: dict[str, Weights] = {}

    def weights(self, memory: str) -> Weights:
        if memory not in self._weights:
            table = ParameterTable.from_tensors(self.model)
            self._weights[memory] = Weights(table, memory=memory, threads=self._threads)
        return self._weights[memory]

    def rethread(self, threads: int) -> None:
        """The same weights for another number of threads."""
        self._threads, self._weights = threads, {}
        torch.set_num_threads(threads)

    def live(self) -> Sequence[torch.Tensor]:
        return list(self.model.values())

    def buffer(self) -> torch.Tensor:
        """One contiguous int32 buffer of the weights' bytes, for the bandwidth limit."""
        nbytes = sum(tensor.nbytes for tensor in self.model.values())
        return torch.zeros(nbytes // 4, dtype=torch.int32)
