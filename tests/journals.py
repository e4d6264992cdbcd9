"""Records of every kind and journals of them, for the tests of the journal.

Nothing here was run: the coefficients and rewards are drawn from the generation's number.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from esfast import AnchoredDecay, StrategyConfig
from esfast import journal_format as form
from esfast.journal import JournalWriter
from esfast.journal_format import (
    GenerationRecord,
    JournalHeader,
    MarkRecord,
    Record,
    SegmentRecord,
    TensorSpec,
)

CONFIG = StrategyConfig(population_size=6, seed=3, decay=AnchoredDecay("l2", 10.0))
TENSORS = tuple(TensorSpec(f"layer.{n}.weight", (n, 7), "bfloat16") for n in range(20))
HEADER = JournalHeader("00f0" * 4, TENSORS, CONFIG, run={"model": "a model", "task": [1, "x"]})


def generation(number: int, config: StrategyConfig = CONFIG, **changes: object) -> GenerationRecord:
    rng = np.random.default_rng(number)
    draws = len(form.derived_terms(config, number))
    record = GenerationRecord(
        generation=number,
        sigma=config.sigma,
        alpha=config.alpha,
        decay=config.decay,
        coefficients=rng.normal(0, 1e-4, draws).astype(np.float32),
        rewards=rng.normal(size=config.population_size),
        failed=number % 3,
        checksum=f"{int(rng.integers(2**63)):016x}" if number % 4 == 0 else None,
    )
    return replace(record, **changes)


def sample_records() -> list[Record]:
    """Nine generations with every optional part somewhere, a mark and a segment between them."""
    own = tuple((2**64 - 1 - n, n) for n in range(6))
    records: list[Record] = [generation(n) for n in range(4)]
    records += [MarkRecord(4, "ff00" * 4), SegmentRecord(4, {"generations": [4, 9]})]
    records += [generation(4, decay=AnchoredDecay("l1", 0.1)), generation(5, decay=None)]
    records += [generation(6, members=own), generation(7, rewards=np.ones((6, 3)))]
    return [*records, generation(8, rewards=None), MarkRecord(9, "1" * 16)]


def sealed(records: list[Record], header: JournalHeader = HEADER) -> tuple[bytes, list[bytes]]:
    """The header's bytes, and each record's."""
    first = form.encode_header(header)
    chain, parts = first[-form.CHECK_BYTES :], []
    for record in records:
        data, chain = form.seal(chain, *form.encode(record))
        parts.append(data)
    return first, parts


def same(left: Record, right: Record) -> bool:
    return form.encode(left) == form.encode(right)


def written(path: Path, records: list[Record], header: JournalHeader = HEADER) -> Path:
    with JournalWriter.create(path, header) as writer:
        for record in records:
            writer.append(record)
    return path


def whole(records: list[Record], header: JournalHeader = HEADER) -> bytes:
    """The bytes of a journal of these records."""
    first, parts = sealed(records, header)
    return first + b"".join(parts)


WHOLE = whole(sample_records())
