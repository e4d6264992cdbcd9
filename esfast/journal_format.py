"""The bytes of a journal: a header, then records, each chained to all before it (docs/journal.md).

    header   magic, format and noise version, length, zlib(JSON), check
    record   head (length, kind, 4 check bytes), payload, 8 check bytes
    check    BLAKE2b over the previous check value, the head and the payload

Little-endian throughout. The head has check bytes of its own, so that a damaged length is damage
and never looks like a torn end. Check values find damage, not forgery: whoever writes a journal can
write valid ones. Nothing here touches files or weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from esfast import _core
from esfast.errors import ConfigError, DataError
from esfast.members import Member
from esfast.strategy import DECAYS, AnchoredDecay, Strategy, StrategyConfig

MAGIC = b"\x89ESJ\r\n\x1a\n"  # as PNG's: a transfer in text mode shows at once
FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16", "float16")
CHECK_BYTES, HEAD_CHECK_BYTES = 8, 4
PREFIX = struct.Struct("<8sHHI")
HEAD = struct.Struct("<IB3x")
LARGEST_HEADER = 1 << 26  # bytes of JSON; SmolLM2-135M's 272 tensors take 15,000
GENERATION, SEGMENT, MARK = 1, 2, 3
_GENERATION = struct.Struct("<QddBdBIQI")
_MARK = struct.Struct("<QQ")
_MEMBER = np.dtype([("seed", "<u8"), ("index", "<u4")])
_HAS_CHECKSUM, _HAS_MEMBERS, _HAS_REWARDS = 1, 2, 4


@dataclass(frozen=True)
class TensorSpec:
    """A canonical tensor of the base model; dtype: "float32", "bfloat16" or "float16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """How many it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return self.elements * (4 if self.dtype == "float32" else 2)


@dataclass(frozen=True)
class JournalHeader:
    """What a journal starts from, and the settings that decide its result to the bit.

    base_checksum, anchor_checksum: `Weights.checksum` of the weights and of decay's anchor before
    generation 0 (None without decay); master: whether the base is kept in fp32, which changes
    results (lean and shadow memory do not); checksum_every: generations between recorded
    checksums; run: JSON of the run's own, such as its model and task.
    """

    base_checksum: str
    tensors: tuple[TensorSpec, ...]
    config: StrategyConfig
    master: bool = False
    anchor_checksum: str | None = None
    checksum_every: int = 10
    run: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class GenerationRecord:
    """All that moves the weights in one generation, and what it came from.

    coefficients: float32 [terms], sign included: neighbouring members that share their noise
    (antithetic pairs) are one term, added in double and rounded once. members: (seed, index) of
    each term, or None where they derive from the run seed. rewards: float64 [population] or
    [population, prompts], or None. failed: rewards that failed and were replaced. checksum: of the
    weights before this update, every `checksum_every` generations.
    """

    generation: int
    sigma: float
    alpha: float
    decay: AnchoredDecay | None
    coefficients: np.ndarray
    members: tuple[tuple[int, int], ...] | None = None
    rewards: np.ndarray | None = None
    failed: int = 0
    checksum: str | None = None

    def terms(self, config: StrategyConfig) -> list[Member]:
        """The members whose noise is added, one a coefficient, all of sign +1."""
        if self.members is None:
            return derived_terms(config, self.generation)
        return [Member(seed, 1, config.noise, index) for seed, index in self.members]


@dataclass(frozen=True)
class SegmentRecord:
    """A run went on at `generation`, with what its settings changed to (JSON, informative)."""

    generation: int
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class MarkRecord:
    """The weights' checksum after `generation` generations: a run ended here, or paused."""

    generation: int
    checksum: str


Record = GenerationRecord | SegmentRecord | MarkRecord


def merged(
    members: Sequence[Member], coefficients: Sequence[float] | np.ndarray
) -> tuple[list[Member], np.ndarray]:
    """Members and coefficients as terms: (members of sign +1, float32 coefficients).

    Neighbours that share their noise are one term; signed coefficients are added in double, then
    rounded to fp32: what the core does itself, so an update by the terms has the same bits.
    """
    terms: list[Member] = []
    sums: list[float] = []
    for member, coefficient in zip(members, coefficients, strict=True):
        plain = Member(member.seed, 1, member.noise, member.index)
        value = member.sign * float(coefficient)
        if terms and terms[-1] == plain:
            sums[-1] += value
        else:
            terms.append(plain)
            sums.append(value)
    with np.errstate(over="ignore"):
        return terms, np.array(sums, dtype=np.float64).astype(np.float32)


def derived_terms(config: StrategyConfig, generation: int) -> list[Member]:
    """The terms of a generation whose members derive from the run seed."""
    step = 2 if config.antithetic else 1
    return Strategy(config).members(generation)[::step]


def check_of(chain: bytes, data: bytes, size: int = CHECK_BYTES) -> bytes:
    """The check value of `data` after `chain`."""
    return hashlib.blake2b(chain + data, digest_size=size).digest()


def seal(chain: bytes, kind: int, payload: bytes) -> tuple[bytes, bytes]:
    """A whole record, and the chain's value after it."""
    head = HEAD.pack(len(payload), kind)
    check = check_of(chain, head + payload)
    return head + check_of(chain, head, HEAD_CHECK_BYTES) + payload + check, check


def encode(record: Record) -> tuple[int, bytes]:
    """Kind and payload of a record."""
    if isinstance(record, GenerationRecord):
        return GENERATION, _encode_generation(record)
    if isinstance(record, MarkRecord):
        return MARK, _MARK.pack(record.generation, int(record.checksum, 16))
    content = {"generation": record.generation, "changes": dict(record.changes)}
    return SEGMENT, json.dumps(content, sort_keys=True).encode()


def decode(kind: int, payload: bytes, config: StrategyConfig) -> Record:
    """The record of a payload. Raises ValueError for one that no journal would hold."""
    if kind == GENERATION:
        return _decode_generation(payload, config)
    if kind == MARK:
        _require(len(payload) == _MARK.size, f"its mark has {len(payload)} bytes")
        generation, checksum = _MARK.unpack(payload)
        return MarkRecord(generation, f"{checksum:016x}")
    _require(kind == SEGMENT, f"its kind is {kind}")
    content = json.loads(payload)
    _require(
        isinstance(content, dict)
        and type(content.get("generation")) is int
        and isinstance(content.get("changes"), dict),
        "its settings are not what a segment holds",
    )
    return SegmentRecord(content["generation"], content["changes"])


def _encode_generation(record: GenerationRecord) -> bytes:
    decay, checksum, rewards = record.decay, record.checksum, record.rewards
    flags = _HAS_CHECKSUM * (checksum is not None) + _HAS_REWARDS * (rewards is not None)
    flags += _HAS_MEMBERS * (record.members is not None)
    parts = [
        _GENERATION.pack(
            record.generation,
            record.sigma,
            record.alpha,
            0 if decay is None else 1 + DECAYS.index(decay.kind),
            0.0 if decay is None else decay.weight,
            flags,
            record.failed,
            int(checksum or "0", 16),
            len(record.coefficients),
        ),
        np.asarray(record.coefficients, dtype="<f4").tobytes(),
    ]
    if record.members is not None:
        parts.append(np.array(list(record.members), dtype=_MEMBER).tobytes())
    if rewards is not None:
        rows, columns = (*rewards.shape, 0)[:2]
        parts += [struct.pack("<II", rows, columns), np.asarray(rewards, dtype="<f8").tobytes()]
    return b"".join(parts)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


class _Reading:
    """Takes a payload apart; ValueError where it is too short."""

    def __init__(self, payload: bytes) -> None:
        self._payload, self._at = payload, 0

    def take(self, size: int) -> bytes:
        end = self._at + size
        _require(end <= len(self._payload), f"it has {len(self._payload)} bytes, and needs {end}")
        part, self._at = self._payload[self._at : end], end
        return part

    def array(self, dtype: str | np.dtype, count: int) -> np.ndarray:
        kind = np.dtype(dtype)
        return np.frombuffer(self.take(count * kind.itemsize), dtype=kind)

    def end(self) -> None:
        extra = len(self._payload) - self._at
        _require(extra == 0, f"it has {extra} bytes too many")


def _decode_generation(payload: bytes, config: StrategyConfig) -> GenerationRecord:
    reading = _Reading(payload)
    fields = _GENERATION.unpack(reading.take(_GENERATION.size))
    generation, sigma, alpha, kind, weight, flags, failed, checksum, count = fields
    coefficients = reading.array("<f4", count).astype(np.float32)
    members = reading.array(_MEMBER, count) if flags & _HAS_MEMBERS else None
    rewards = _decode_rewards(reading) if flags & _HAS_REWARDS else None
    reading.end()
    record = GenerationRecord(
        generation=generation,
        sigma=sigma,
        alpha=alpha,
        decay=None if kind == 0 else AnchoredDecay(DECAYS[kind - 1], weight),
        coefficients=coefficients,
        members=None if members is None else tuple((int(s), int(i)) for s, i in members),
        rewards=rewards,
        failed=failed,
        checksum=f"{checksum:016x}" if flags & _HAS_CHECKSUM else None,
    )
    _check_generation(record, flags, config)
    return record


def _decode_rewards(reading: _Reading) -> np.ndarray:
    rows, columns = (int(n) for n in reading.array("<u4", 2))
    values = reading.array("<f8", rows * max(columns, 1)).astype(np.float64)
    return values.reshape(rows, columns) if columns else values


def _check_generation(record: GenerationRecord, flags: int, config: StrategyConfig) -> None:
    _require(flags < 8, f"its flags are {flags}")
    numbers = (record.sigma, record.alpha)
    _require(all(math.isfinite(x) and x > 0 for x in numbers), f"sigma and alpha are {numbers}")
    _require(bool(np.isfinite(record.coefficients).all()), "a coefficient is not finite")
    if record.decay is not None:
        record.decay.strength(record.alpha)
    if record.members is None:
        draws = config.population_size // (2 if config.antithetic else 1)
        count = len(record.coefficients)
        _require(count == draws, f"it has {count} coefficients for {draws} draws")
        return
    seeds = {term.seed for term in record.terms(config)}
    _require(config.noise != "hadamard" or len(seeds) < 2, "its Hadamard members differ in seed")


def encode_header(header: JournalHeader) -> bytes:
    """The header's bytes; their last 8 start the chain."""
    tensors: dict[str, list[Any]] = {}
    for tensor in header.tensors:
        tensors.setdefault(tensor.dtype, []).append([tensor.name, list(tensor.shape)])
    content = {
        "base": {"checksum": header.base_checksum, "tensors": tensors},
        "strategy": asdict(header.config),
        "master": header.master,
        "anchor": header.anchor_checksum,
        "checksum_every": header.checksum_every,
        "run": dict(header.run),
    }
    packed = zlib.compress(json.dumps(content, sort_keys=True).encode(), 9)
    data = PREFIX.pack(MAGIC, FORMAT_VERSION, int(_core.noise_version), len(packed)) + packed
    return data + check_of(b"", data)


def _header_end(data: bytes, where: str) -> int:
    if len(data) < PREFIX.size or not data.startswith(MAGIC):
        raise DataError(
            f"'{where}' is no journal: it starts with {data[:8]!r}, expected {MAGIC!r}. Give a "
            "run's folder, its journal.esj, or an exported adapter."
        )
    _, version, noise, length = PREFIX.unpack_from(data)
    for what, seen, known in (
        ("format", version, FORMAT_VERSION),
        ("noise", noise, int(_core.noise_version)),
    ):
        if seen != known:
            raise DataError(
                f"'{where}' has {what} version {seen}, and this esfast knows {known}; read it with "
                "the esfast that wrote it (or its header is damaged)."
            )
    end = PREFIX.size + length + CHECK_BYTES
    body = data[: end - CHECK_BYTES]
    if data[end - CHECK_BYTES : end] != check_of(b"", body):
        raise DataError(
            f"'{where}': its header is damaged (the check value does not fit its {length} bytes). "
            "Copy the file again, or start the run anew."
        )
    return end


def decode_header(data: bytes, where: str) -> tuple[JournalHeader, int]:
    """The header of a journal's bytes, and where the records start. Raises DataError for another
    format or version, and for a damaged header."""
    end = _header_end(data, where)
    try:
        packed = data[PREFIX.size : end - CHECK_BYTES]
        content = json.loads(zlib.decompressobj().decompress(packed, LARGEST_HEADER))
        return _header_of(content), end
    except (
        *(zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError),
        *(OverflowError, ConfigError),
    ) as error:
        raise DataError(
            f"'{where}': its header is not a journal's ({type(error).__name__}: {error}). Copy the "
            "file again, or start the run anew."
        ) from None


def _header_of(content: dict[str, Any]) -> JournalHeader:
    base, strategy, anchor = content["base"], dict(content["strategy"]), content["anchor"]
    decay = strategy.pop("decay")
    tensors = tuple(
        TensorSpec(str(name), tuple(int(n) for n in shape), dtype)
        for dtype, entries in base["tensors"].items()
        for name, shape in entries
    )
    for tensor in tensors:
        known = tensor.dtype in DTYPES and min(tensor.shape, default=0) >= 0
        _require(known, f"its tensor {tensor} is not one")
    _require(isinstance(content["run"], dict), "its run is no object")
    every = content["checksum_every"]
    _require(type(every) is int and every >= 1, f"checksum_every is {every!r}")
    return JournalHeader(
        base_checksum=_checksum(base["checksum"]),
        tensors=tensors,
        config=StrategyConfig(**strategy, decay=decay and AnchoredDecay(**decay)),
        master=bool(content["master"]),
        anchor_checksum=None if anchor is None else _checksum(anchor),
        checksum_every=every,
        run=content["run"],
    )


def _checksum(text: str) -> str:
    return f"{int(text, 16):016x}"
