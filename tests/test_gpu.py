"""On a CUDA device: the CPU's bits, for everything that the kernels do. Not yet run on a GPU.

Every comparison is of bits, and names the first wrong element. The CPU is the reference here; what
it does is pinned by the rest of the suite.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import test_sharding
import torch
from cases import (
    DTYPES,
    MODES,
    NEEDS_KERNELS,
    NOISES,
    TORCH,
    assert_bits,
    coefficients,
    nasty_bits,
    plain_bits,
    population,
    tensor_of,
    tensors,
)

from esfast import (
    Anchor,
    AnchoredDecay,
    ParameterTable,
    StateError,
    Weights,
    anchor_stream,
    shaping,
)
from esfast.device_shaping import shape_on_device
from esfast.members import Member
from esfast.segments import Segment

pytestmark = [pytest.mark.gpu, NEEDS_KERNELS]
MEMORIES = (*MODES, "master")


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """The same view, strides and offset included, of a copy of its whole storage on the device."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    room = torch.as_strided(tensor, (count,), (1,), 0).cuda()
    return torch.as_strided(room, tensor.shape, tensor.stride(), tensor.storage_offset())


def on_device(segments: Sequence[Segment]) -> list[Segment]:
    return [Segment(s.name, s.shape, moved(s.tensor), s.start) for s in segments]


def of_model(model: dict[str, torch.Tensor]) -> list[Segment]:
    return [Segment(name, tuple(t.shape), t) for name, t in model.items()]


def assert_same(device: Sequence[Segment], host: Sequence[Segment], what: str) -> None:
    for a, b in zip(device, host, strict=True):
        assert_bits(a.tensor.cpu(), b.tensor, f"{what} {a.name}")


class Pair:
    """One table on the CPU and its copy on the device, taken through the same calls."""

    def __init__(self, segments: Sequence[Segment], memory: str, anchored: bool = False) -> None:
        self.host, self.device = list(segments), on_device(segments)
        self.weights = []
        for held in (self.host, self.device):
            table = ParameterTable(held)
            anchor = Anchor.in_memory(table) if anchored else None
            self.weights.append(Weights(table, memory=memory, anchor=anchor))

    def perturb(self, member: Member, sigma: float) -> None:
        for w in self.weights:
            w.perturb(member, sigma)
        self.check(f"perturbed by {sigma}")

    def restore(self) -> None:
        for w in self.weights:
            w.restore()
        self.check("restored")

    def update(self, members: list[Member], values: list[float], **options: object) -> None:
        reports = [w.update(members, values, **options) for w in self.weights]  # type: ignore[arg-type]
        assert reports[0].saturated == reports[1].saturated
        self.check("updated")

    def check(self, what: str) -> None:
        assert_same(self.device, self.host, what)
        assert self.weights[0].checksum() == self.weights[1].checksum(), what


# ---- noise -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "members"), [("gaussian", 4), ("rademacher", 1), ("hadamard", 1)]
)
def test_a_billion_draws(noise: str, members: int) -> None:
    """2^28 a member, as fp32 weights that were 0; the first wrong one is named."""
    count = 1 << 28
    host, device = torch.zeros(count), torch.zeros(count, device="cuda")
    pair = [Weights(ParameterTable.from_tensors({"w": t}), "shadow") for t in (host, device)]
    for seed in range(members):
        for w in pair:
            w.perturb(Member(seed=0xABCDEF0123456789 + seed, noise=noise, index=seed), 1.0)
        if pair[0].checksum() != pair[1].checksum():
            assert_bits(device.cpu(), host, f"{noise} of member {seed}")
            raise AssertionError("the checksums differ and the bits do not")


# ---- weights -----------------------------------------------------------------------------------

SIGMAS = (1e-3, 0.02, 30.0, 1e30, 1e-44)


def member_of(noise: str, sign: int) -> Member:
    return Member(seed=0x1234567890ABCDEF, sign=sign, noise=noise, index=37 * (noise == "hadamard"))


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_and_restore(dtype: str, noise: str, memory: str) -> None:
    pair = Pair(of_model(tensors(dtype)), memory)
    for sigma in SIGMAS:
        for sign in (1, -1):  # the second takes the first back
            pair.perturb(member_of(noise, sign), sigma)
        pair.restore()


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_mixed_tables(dtype: str, memory: str) -> None:
    model = {"w": tensor_of(nasty_bits(dtype, 3_000_001), dtype)}
    for other in DTYPES:
        model |= {f"{other}.{name}": t for name, t in tensors(other).items()}
    pair = Pair(of_model(model), memory, anchored=True)
    pair.perturb(member_of("gaussian", 1), 0.01)
    pair.restore()
    decay = AnchoredDecay("l1", 0.1)
    pair.update(population("gaussian", 5), coefficients(5), decay=decay, alpha=0.1, seed=3)


@pytest.mark.parametrize("layout", test_sharding.LAYOUTS)
@pytest.mark.parametrize("cuts", test_sharding.CUTS)
def test_awkward_segments(layout: str, cuts: str) -> None:
    for k, (dtype, noise) in enumerate(zip(DTYPES, NOISES, strict=True)):
        whole = test_sharding.whole_tensor(dtype)
        segments = test_sharding.LAYOUTS[layout](whole, test_sharding.cut(cuts))
        pair = Pair(segments, MEMORIES[k], anchored=True)
        pair.perturb(member_of(noise, -1), 0.02)
        pair.restore()
        decay = AnchoredDecay("l2", 3.0)
        pair.update(population(noise, 40), coefficients(40), decay=decay, alpha=0.1, seed=k)


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 1.0, 1e10, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_an_exception(dtype: str, sigma: float) -> None:
    rng = np.random.default_rng(2)
    kind = nasty_bits(dtype, 1).dtype
    raw = rng.integers(0, np.iinfo(kind).max, 700_001, dtype=kind, endpoint=True)
    for bits in (raw, (raw % kind.type(0x60)).astype(kind)):
        pair = Pair(of_model({"w": tensor_of(bits, dtype)}), "lean")
        pair.perturb(member_of("gaussian", 1), sigma)
        pair.restore()
        assert_bits(pair.device[0].tensor.cpu(), bits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_grow(dtype: str) -> None:
    """From lists sized for few exceptions to members that make every weight one."""
    bits = plain_bits(dtype, 5_000_000)
    pair = Pair(of_model({"w": tensor_of(bits, dtype)}), "lean")
    held = []
    for sigma in (1e-6, 1e-3, 0.1, 1e4):
        pair.perturb(member_of("gaussian", 1), sigma)
        held.append(pair.weights[1].memory_use().extra_bytes)
        pair.restore()
    assert held[0] < held[-1] and held[-1] > bits.nbytes
    expected = pair.weights[1].expected_bytes(1e4)
    assert 0.5 * held[-1] < expected < 2 * held[-1]


def test_thousands_of_tiny_tensors_and_a_large_one() -> None:
    model = {f"n{k}": tensor_of(plain_bits("bfloat16", k % 19, k), "bfloat16") for k in range(3000)}
    model["huge"] = tensor_of(plain_bits("bfloat16", 2_000_003), "bfloat16")
    pair = Pair(of_model(model), "lean")
    pair.perturb(member_of("hadamard", 1), 0.01)
    pair.restore()
    pair.update(population("hadamard", 33), coefficients(33), seed=4)


# ---- updates -----------------------------------------------------------------------------------

DECAYS = (None, AnchoredDecay("l1", 0.2), AnchoredDecay("l2", 3.0))


@pytest.mark.parametrize("decay", DECAYS, ids=["none", "l1", "l2"])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_update(
    dtype: str, noise: str, memory: str, rounding: str, decay: AnchoredDecay | None
) -> None:
    pair = Pair(of_model(tensors(dtype)), memory, anchored=True)
    for seed in (1, 2):
        members, values = population(noise, 8, antithetic=seed == 2), coefficients(8, 0.02)
        pair.update(members, values, decay=decay, alpha=0.1, rounding=rounding, seed=seed)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 64, 97, 200, 1024, 3000])
@pytest.mark.parametrize("noise", NOISES)
def test_population_sizes(noise: str, size: int) -> None:
    """Beyond one parameter block of members, and beyond what shared memory holds of tables."""
    pair = Pair(of_model({"w": tensor_of(plain_bits("bfloat16", 9001), "bfloat16")}), "lean")
    pair.update(population(noise, size), coefficients(size, 1e-3), seed=9)


def test_saturation_is_counted() -> None:
    pair = Pair(of_model({"w": torch.full((5000,), 6e4, dtype=torch.float16)}), "lean")
    pair.update(population("gaussian", 3), [3e3, 3e3, 3e3], seed=1)
    assert pair.weights[1].update(population("gaussian", 3), [3e3, 3e3, 3e3], seed=2).saturated > 0


# ---- streams and graphs ------------------------------------------------------------------------


def test_two_streams() -> None:
    """Two models on two streams, neither waiting for the other, each with its own members."""
    sizes = (30_000_001, 20_000_003)
    pairs = [
        Pair(of_model({f"w{k}": tensor_of(plain_bits("bfloat16", n, k), "bfloat16")}), "shadow")
        for k, n in enumerate(sizes)
    ]
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    for step in range(5):
        for pair, stream in zip(pairs, streams, strict=True):
            with torch.cuda.stream(stream):
                pair.weights[1].perturb(Member(seed=step), 1e-2)
    torch.cuda.synchronize()
    for pair in pairs:
        pair.weights[0].perturb(Member(seed=4), 1e-2)
        pair.check("perturbed")
    for pair, stream in zip(pairs, streams, strict=True):
        with torch.cuda.stream(stream):
            pair.restore()
            pair.update(population("gaussian", 4), coefficients(4), seed=2)


@pytest.mark.parametrize("noise", NOISES)
def test_graph_capture(noise: str) -> None:
    """A captured member, restore and update replay as they ran; the arguments are gone by then."""
    pair = Pair(of_model(tensors("bfloat16")), "shadow", anchored=True)
    members, values = population(noise, 40), coefficients(40, 0.02)
    decay = AnchoredDecay("l2", 3.0)
    pair.update(members, values, decay=decay, alpha=0.1, seed=4)  # torch's own kernels are loaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.weights[1].perturb(member_of(noise, 1), 0.02)
        pair.weights[1].restore()
        report = pair.weights[1].update(members, values, decay=decay, alpha=0.1, seed=5)
    assert report.saturated == -1
    members.clear()
    values.clear()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        pair.weights[0].update(
            population(noise, 40), coefficients(40, 0.02), decay=decay, alpha=0.1, seed=5
        )
        pair.check("replayed")


def test_lean_memory_refuses_capture() -> None:
    pair = Pair(of_model(tensors("bfloat16")), "lean")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(StateError, match="shadow"), torch.cuda.graph(graph):
        pair.weights[1].perturb(member_of("gaussian", 1), 0.02)


# ---- shaping, anchors, the loop ----------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 30, 1000, 5000])
@pytest.mark.parametrize("method", [m for m in shaping.METHODS if m != "group_centered"])
def test_shaping(method: str, count: int) -> None:
    rng = np.random.default_rng(count)
    for rewards in (rng.normal(size=count), rng.integers(0, 3, count) * 0.1, np.full(count, 0.3)):
        got = shape_on_device(torch.from_numpy(rewards.astype(np.float64)).cuda(), method)
        want = shaping.shape(rewards, method)
        assert got.cpu().numpy().tobytes() == want.tobytes(), (method, count)


@pytest.mark.parametrize(("members", "prompts"), [(2, 1), (30, 200), (257, 33)])
def test_group_centered_shaping(members: int, prompts: int) -> None:
    rewards = np.random.default_rng(1).integers(0, 4, (members, prompts)) * 0.25
    rewards[:, 0] = 1.0
    got = shape_on_device(torch.from_numpy(rewards).cuda(), "group_centered")
    want = shaping.shape(rewards, "group_centered")
    assert got.cpu().numpy().tobytes() == want.tobytes()


def test_the_loop() -> None:
    from esfast import EvolutionStrategy

    results = []
    for device in ("cpu", "cuda"):
        model = torch.nn.Linear(33, 17, dtype=TORCH["bfloat16"])
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 33 * 17).reshape(17, 33))
            model.bias.zero_()
        model.to(device)
        es = EvolutionStrategy(model, sigma=0.01, alpha=0.1, decay=AnchoredDecay("l2", 1.0))
        for _ in range(3):
            rewards = [float(member.seed % 101) for member in es.population()]
            es.step(rewards)
        results.append(es.weights.checksum())
    assert results[0] == results[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_engine_on_the_device(temperature: float) -> None:
    """Other tokens under a member, the first ones after it; rows end at different steps."""
    pytest.importorskip("transformers")
    from tiny_models import byte_tokenizer, llama

    from esfast.engines import Sampling
    from esfast.engines.transformers import TransformersEngine

    ask: tuple = (["sun", "12 + 7", "", "why? " * 9, "ice"], Sampling(20, temperature))
    checksums = []
    for device in ("cpu", "cuda"):
        model = llama().to(device)
        model.generation_config.eos_token_id = [2, *range(3, 259, 9)]
        engine = TransformersEngine(model, byte_tokenizer(), batch_size=4)
        weights = engine.live_weights(anchor=True)
        first = engine.generate(*ask)
        weights.perturb(Member(seed=1), 0.1)
        other = engine.generate(*ask)
        weights.restore()
        assert engine.generate(*ask) == first != other
        weights.update([Member(seed=1)], [0.1], decay=AnchoredDecay("l2", 1.0), alpha=0.1)
        checksums.append((weights.checksum(), weights.anchor_checksum()))
    assert checksums[0] == checksums[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_anchors_in_files_and_in_pinned_memory(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed in many small windows, and read over the bus: the bits of an anchor in memory."""
    from safetensors.torch import save_file

    monkeypatch.setattr(anchor_stream, "CHUNK", 1 << 20)
    monkeypatch.setattr(anchor_stream.AnchorStream.__init__, "__defaults__", (1 << 20,))
    model = {"w": tensor_of(plain_bits(dtype, 3_000_001), dtype), **tensors(dtype, plain_bits)}
    save_file(model, tmp_path / "model.safetensors")
    decay, found = AnchoredDecay("l2", 2.0), []
    for place in ("memory", "pinned", "file"):
        held = {name: t.clone().cuda() for name, t in model.items()}
        table = ParameterTable.from_tensors(held)
        anchor = {
            "memory": lambda table=table: Anchor.in_memory(table),
            "pinned": lambda table=table: Anchor.in_pinned_memory(table),
            "file": lambda table=table: Anchor.from_safetensors(tmp_path, table),
        }[place]()
        weights = Weights(table, anchor=anchor)
        for seed in (1, 2, 3):
            members, values = population("gaussian", 4), coefficients(4, 0.02)
            weights.update(members, values, decay=decay, alpha=0.1, seed=seed)
        found.append((weights.checksum(), weights.anchor_checksum()))
    assert found[0] == found[1] == found[2]
