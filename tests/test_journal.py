"""The journal's bytes: what is written is read, exported and found again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from journals import HEADER, WHOLE, generation, same, sample_records, sealed, written

from esfast import StrategyConfig
from esfast import journal_format as form
from esfast.journal import JournalWriter, export_journal, journal_path, read_journal
from esfast.journal_format import GenerationRecord, Record, SegmentRecord
from esfast.strategy import Strategy


def test_every_field_comes_back_to_the_bit(tmp_path):
    journal = read_journal(written(tmp_path / "j.esj", sample_records()))
    assert journal.header == HEADER and journal.torn is None
    assert len(journal.generations) == 9
    for got, want in zip(journal.records, sample_records(), strict=True):
        assert type(got) is type(want) and same(got, want)
    got, want = journal.generations[6], sample_records()[8]
    assert got.members == want.members and np.array_equal(got.coefficients, want.coefficients)
    assert journal.generations[7].rewards.shape == (6, 3)
    assert [r.failed for r in journal.generations] == [0, 1, 2] * 3
    assert [r.checksum is not None for r in journal.generations] == [n % 4 == 0 for n in range(9)]


@pytest.mark.parametrize("noise", ["gaussian", "hadamard"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_terms_are_the_members_that_share_noise(noise, antithetic):
    config = StrategyConfig(population_size=6, noise=noise, antithetic=antithetic)
    members = Strategy(config).members(3)
    values = np.array([0.1, 0.2, -0.3, 0.4, 1e-30, 0.6])
    terms, coefficients = form.merged(members, values)
    assert terms == form.derived_terms(config, 3)
    if antithetic:
        values = values[::2] - values[1::2]
    assert coefficients.dtype == np.float32 and np.array_equal(coefficients, values.astype("f4"))


def test_special_coefficients_keep_their_bits(tmp_path):
    odd = np.array([-0.0, 2.0**-149, -(2.0**-127), 3.4028235e38, 1.1, 0.0], dtype=np.float32)
    path = written(tmp_path / "j", [generation(0, coefficients=odd)])
    assert read_journal(path).generations[0].coefficients.tobytes() == odd.tobytes()


def test_500_generations_of_30_stay_small(tmp_path):
    config = StrategyConfig(population_size=30)
    header = replace(HEADER, config=config)
    records: list[Record] = []
    for n in range(500):
        rewards = np.random.default_rng(n).normal(size=30)
        _, coefficients = form.merged(
            Strategy(config).members(n), Strategy(config).coefficients(rewards)
        )
        records.append(generation(n, config, coefficients=coefficients, rewards=None, decay=None))
    first, parts = sealed(records, header)
    assert max(map(len, parts)) == 190 < 400
    path = tmp_path / "j"
    path.write_bytes(first + b"".join(parts))
    exported = export_journal(read_journal(path), tmp_path / "small")
    assert exported < 500 * 100  # ranks are 30 numbers in some order: 51 bytes a generation
    small = read_journal(tmp_path / "small")
    assert all(same(a, b) for a, b in zip(small.records, records, strict=True))


def test_an_exported_journal_holds_the_updates_alone(tmp_path):
    (tmp_path / "j").write_bytes(WHOLE)
    export_journal(read_journal(tmp_path / "j"), tmp_path / "e")
    journal = read_journal(tmp_path / "e")
    assert journal.header == replace(HEADER, run={})
    assert not [r for r in journal.records if isinstance(r, SegmentRecord)]
    kept = [r for r in sample_records() if not isinstance(r, SegmentRecord)]
    for got, want in zip(journal.records, kept, strict=True):
        plain = replace(want, rewards=None) if isinstance(want, GenerationRecord) else want
        assert same(got, plain)


def test_a_runs_folder_stands_for_its_journal(tmp_path):
    written(tmp_path / "journal.esj", sample_records())
    assert journal_path(tmp_path) == tmp_path / "journal.esj"
    assert len(read_journal(tmp_path).records) == len(sample_records())


def test_chains_name_a_generation_whatever_else_is_recorded(tmp_path):
    records = sample_records()
    journal = read_journal(written(tmp_path / "j", records))
    bare = read_journal(written(tmp_path / "k", records[:4]))
    assert journal.chain_at(4) == bare.chain_at(4) == bare.chains[-1].hex()
    assert journal.chain_at(0) == journal.chains[0].hex()
    assert len({journal.chain_at(n) for n in range(10)}) == 10
    with JournalWriter.resume(tmp_path / "j") as writer:
        assert writer.chain == journal.chain_at(9) and writer.generation == 9
        writer.append(generation(9))
        assert writer.chain == read_journal(tmp_path / "j").chain_at(10)
