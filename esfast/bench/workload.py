"""The weights that the benchmarks run on, the cases, and how a case is run.

A table is SmolLM2-135M's, another model's by its configuration alone, or one of as many parameters
as asked for; it is filled with normals of spread 0.03, which is what lean memory's records depend
on. A `Case` names one pass; `passes` gives the seconds of each kernel that it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from time import perf_counter
from typing import Any

import torch

from esfast import Member, ParameterTable, Weights
from esfast.errors import ConfigError
from esfast.models import DEFAULT_MODEL

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CYCLE, UPDATE, CHECKSUM = "perturb+restore", "update", "checksum"
# One member for the next, as lean memory takes them through a generation: another's noise, or the
# same with the other sign.
EXCHANGE, MIRROR = "exchange", "mirror"
KERNELS = ("perturb", EXCHANGE, MIRROR, "restore", CYCLE, UPDATE, CHECKSUM)
# Stand where a memory mode does: torch's loops; plain buffers; a table that stays in the cache.
TORCH, BUFFER, CACHE = "torch", "buffer", "cache"
SIGMA = 1e-3
SPREAD = 0.03
LARGEST_BUFFER = 1 << 30  # bytes; more of them measures the same bandwidth
MOST_LAYERS = 100  # of a made-up table
HEAD_START = 4_000_000  # cycles of the device, about 2 ms
PEER_SHARE = 16  # the slow peer runs on one in so many parameters
Shapes = Mapping[str, tuple[int, ...]]
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Case:
    """One thing to time. kernel: "perturb+restore" (which also gives its two halves, and in lean
    memory what is between two members), "update" or "checksum"; target: the instruction set in
    force, "cuda", or "torch"; device: torch's name."""

    kernel: str
    noise: str
    dtype: str
    memory: str
    population: int = 1
    target: str = TORCH
    device: str = "cpu"

    def __str__(self) -> str:
        words = (self.kernel, self.noise, self.dtype, self.memory, self.population, self.target)
        return "-".join(map(str, words))


# ---- shapes ------------------------------------------------------------------------------------


def llama_shapes(layers: int, rows: int, width: int = 576, inner: int = 1536) -> Shapes:
    """A tied model of SmolLM2's proportions (a third of the width for keys and values)."""
    keys = width // 3
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, width)}
    out["model.norm.weight"] = (width,)
    for n in range(layers):
        base = f"model.layers.{n}."
        out[base + "input_layernorm.weight"] = (width,)
        out[base + "post_attention_layernorm.weight"] = (width,)
        for name, size in (("q", width), ("k", keys), ("v", keys)):
            out[base + f"self_attn.{name}_proj.weight"] = (size, width)
        out[base + "self_attn.o_proj.weight"] = (width, width)
        out[base + "mlp.gate_proj.weight"] = (inner, width)
        out[base + "mlp.up_proj.weight"] = (inner, width)
        out[base + "mlp.down_proj.weight"] = (width, inner)
    return out


def shapes_of_count(parameters: int) -> Shapes:
    """Exactly so many parameters: about a fifth in an embedding, then layers, and what is left.

    Layers are SmolLM2's, or twice as wide, or four times ..., so that there are at most 100.
    """
    width, inner = 576, 1536
    while 0.79 * parameters > MOST_LAYERS * count(llama_shapes(1, 0, width, inner)):
        width, inner = 2 * width, 2 * inner
    layer = count(llama_shapes(1, 0, width, inner)) - width  # without the last norm
    layers = max(0, int(0.79 * parameters - width)) // layer
    rows, rest = divmod(max(0, parameters - width - layers * layer), width)
    out = dict(llama_shapes(layers, rows, width, inner))
    if not rows:
        del out["model.embed_tokens.weight"], out["model.norm.weight"]
        rest = parameters
    return {**out, "rest": (1, rest)} if rest else out


def shapes_of_model(name: str) -> Shapes:
    """The shapes of a model; its weights are neither fetched nor read.

    Raises ConfigError for a name or folder without a configuration that transformers knows.
    """
    if name == DEFAULT_MODEL:
        return llama_shapes(layers=30, rows=49152)  # 134,515,008 parameters
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            make: Any = AutoModelForCausalLM.from_config
            model = make(config, trust_remote_code=False)
    except Exception as error:  # the library's own, the hub's, the network's
        raise ConfigError(
            f"the shapes of --model {name!r} could not be had: {str(error).strip()[:300]!r}. Give "
            f"{DEFAULT_MODEL}, a folder with a config.json, a name on the hub (the extra 'train' "
            f"reads both), or --parameters."
        ) from None
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def sixteenth(shapes: Shapes) -> Shapes:
    """One in sixteen of the tensors of each shape, at least one, whole; a lone matrix loses rows.

    Of SmolLM2: two full-sized layers and 3,072 embedding rows.
    """
    wanted, taken = Counter(shapes.values()), Counter[tuple[int, ...]]()
    out: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if wanted[shape] == 1 and len(shape) > 1:
            out[name] = (-(-shape[0] // PEER_SHARE), *shape[1:])
        elif taken[shape] < -(-wanted[shape] // PEER_SHARE):
            out[name] = shape
            taken[shape] += 1
    return out


def count(shapes: Shapes) -> int:
    """Parameters."""
    return sum(map(prod, shapes.values()))


# ---- contents ----------------------------------------------------------------------------------


def tensors(shapes: Shapes, dtype: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Normals of spread 0.03, vectors of ones (norm gains), in the dtype asked for."""
    generator = torch.Generator(device=device).manual_seed(0)
    out = {}
    for name, shape in shapes.items():
        tensor = torch.ones(shape, dtype=DTYPES[dtype], device=device)
        out[name] = tensor.normal_(0, SPREAD, generator=generator) if len(shape) > 1 else tensor
    return out


def members(noise: str, population: int) -> list[Member]:
    """A generation; Hadamard members share a seed and differ in their index."""
    if noise == "hadamard":
        return [Member(seed=1, noise=noise, index=n) for n in range(population)]
    return [Member(seed=n + 1, noise=noise) for n in range(population)]


def coefficients(population: int) -> list[float]:
    """Small enough that a hundred updates leave the weights' scale alone."""
    return [1e-7 * ((-1) ** n) * (1 + n) for n in range(population)]


# ---- timing ------------------------------------------------------------------------------------


def wall_seconds(run: Callable[[], object]) -> float:
    """One call, by the clock on the wall."""
    start = perf_counter()
    run()
    return perf_counter() - start


def cuda_seconds(run: Callable[[], object]) -> float:
    """One call, between two events of the current stream: what the device took, not the launch.

    The device is kept busy first, until the host has queued the call. Otherwise the 0.03 to 0.5 ms
    that Python needs for that would count.
    """
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    busy: Any = torch.cuda._sleep
    busy(HEAD_START)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def timer(device: str) -> Timer:
    """How calls on a device are timed."""
    return cuda_seconds if torch.device(device).type == "cuda" else wall_seconds


def passes(case: Case, weights: Weights) -> dict[str, Callable[[], object]]:
    """The kernels of a case by name, to be called in this order."""
    if case.kernel == CHECKSUM:
        return {CHECKSUM: weights.checksum}
    if case.kernel == UPDATE:
        people, scalars = members(case.noise, case.population), coefficients(case.population)
        return {UPDATE: lambda: weights.update(people, scalars, seed=7)}
    first, second = members(case.noise, 2)
    turns = {"perturb": first}
    if case.memory == "lean":  # the other modes perturb their base, whatever was applied
        turns |= {EXCHANGE: second, MIRROR: replace(second, sign=-1)}
    calls = {name: partial(weights.perturb, member, SIGMA) for name, member in turns.items()}
    return {**calls, "restore": weights.restore}


class Bench:
    """The weights of one dtype on one device, with a Weights a memory mode, made when asked for."""

    def __init__(self, shapes: Shapes, dtype: str, threads: int, device: str = "cpu") -> None:
        self.shapes, self.dtype, self.device, self.threads = shapes, dtype, device, threads
        self.model = tensors(shapes, dtype, device)
        self.parameters = count(shapes)
        self._weights: dict[str, Weights] = {}

    def weights(self, memory: str) -> Weights:
        """The same tensors under another memory mode; only one of them may hold a member."""
        if memory not in self._weights:
            # `.data` has no count of edits: the modes and torch's loops undo one another's here.
            table = ParameterTable.from_tensors({n: t.data for n, t in self.model.items()})
            self._weights[memory] = Weights(table, memory=memory, threads=self.threads)
        return self._weights[memory]

    def rethread(self, threads: int) -> None:
        """The same tensors for another number of threads, ours and torch's."""
        self.threads, self._weights = threads, {}
        torch.set_num_threads(threads)

    def live(self) -> Sequence[torch.Tensor]:
        """The weights themselves."""
        return list(self.model.values())

    def part(self) -> Sequence[torch.Tensor]:
        """Other tensors, a sixteenth of the table, for a slow peer."""
        return list(tensors(sixteenth(self.shapes), self.dtype, self.device).values())

    def buffer(self) -> torch.Tensor:
        """An int32 buffer of the weights' bytes, at most 1 GiB, of zeros."""
        nbytes = min(self.parameters * DTYPES[self.dtype].itemsize, LARGEST_BUFFER)
        return torch.zeros(max(1, nbytes // 4), dtype=torch.int32, device=self.device)
