"""The journal's bytes: what is written is read, and no damage is ever taken for a run."""

from __future__ import annotations

import os
import random
import resource
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esfast import AnchoredDecay, ConfigError, DataError, EsfastError, StateError, StrategyConfig
from esfast import journal_format as form
from esfast.journal import (
    JournalWriter,
    export_journal,
    journal_path,
    parse,
    read_journal,
)
from esfast.journal_format import (
    GenerationRecord,
    JournalHeader,
    MarkRecord,
    Record,
    SegmentRecord,
    TensorSpec,
)
from esfast.strategy import Strategy

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


@pytest.fixture(scope="module")
def whole() -> bytes:
    first, parts = sealed(sample_records())
    return first + b"".join(parts)


def written(path: Path, records: list[Record], header: JournalHeader = HEADER) -> Path:
    with JournalWriter.create(path, header) as writer:
        for record in records:
            writer.append(record)
    return path


# --- what is written is read ------------------------------------------------------------------


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
    assert journal.generations[0].checksum == want.checksum or journal.generations[0].checksum


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


def test_an_exported_journal_holds_the_updates_alone(tmp_path, whole):
    (tmp_path / "j").write_bytes(whole)
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


# --- the corrupted-journal corpus -------------------------------------------------------------

Mutation = tuple[str, bytes]


def flips(data: bytes, count: int) -> list[Mutation]:
    rng = random.Random(1)
    places = [*range(60), *rng.sample(range(len(data)), count)]
    out = []
    for at in places:
        bit = rng.randrange(8)
        changed = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        out.append((f"bit {bit} of byte {at} flipped", changed))
    return out


def byte_edits(data: bytes, count: int) -> list[Mutation]:
    rng = random.Random(2)
    out = []
    for at in rng.sample(range(len(data)), count):
        out += [(f"byte {at} gone", data[:at] + data[at + 1 :]),
                (f"a byte put in at {at}", data[:at] + b"\x41" + data[at:]),
                (f"cut at {at}", data[:at]),
                (f"zeros from {at}", data[:at] + bytes(len(data) - at))]  # fmt: skip
    return out


def record_edits(first: bytes, parts: list[bytes], other: list[bytes]) -> list[Mutation]:
    out = []
    for n in range(len(parts)):
        out.append((f"record {n} missing", b"".join([first, *parts[:n], *parts[n + 1 :]])))
        out.append((f"record {n} twice", b"".join([first, *parts[: n + 1], *parts[n:]])))
        out.append(
            (f"record {n} of another run", b"".join([first, *parts[:n], other[n], *parts[n + 1 :]]))
        )
        swapped = [*parts[:n], *parts[n + 1 : n + 2], parts[n], *parts[n + 2 :]]
        if n + 1 < len(parts):
            out.append((f"records {n} and {n + 1} swapped", b"".join([first, *swapped])))
    return out


def foreign(whole: bytes) -> list[Mutation]:
    later = whole[:8] + struct.pack("<H", 2) + whole[10:]
    noise = whole[:10] + struct.pack("<H", 9) + whole[12:]
    return [
        ("nothing", b""),
        ("text", b"generation,reward\n0,1.0\n" * 40),
        ("CR LF", whole.replace(b"\n", b"\r\n", 1)),
        ("a later format", later),
        ("another noise", noise),
        ("junk after the end", whole + b"\x07" * 200),
        ("a zip", zlib.compress(whole)),
    ]


def corpus() -> list[Mutation]:
    first, parts = sealed(sample_records())
    _, other = sealed(sample_records(), replace(HEADER, base_checksum="1" * 16))
    data = first + b"".join(parts)
    return [
        *flips(data, 140),
        *byte_edits(data, 25),
        *record_edits(first, parts, other),
        *foreign(data),
    ]


def harmless(data: bytes, whole: bytes) -> bool:
    """Whether what is read is the original's beginning, and a loss is told or is a clean cut."""
    journal, original = parse(data, "j"), parse(whole, "j")
    begins = all(same(a, b) for a, b in zip(journal.records, original.records, strict=False))
    shorter = len(journal.records) < len(original.records)
    told = journal.torn is not None and "dropped" in journal.torn
    same_head = journal.header == original.header
    return same_head and begins and (not shorter or told or whole.startswith(data))


def test_no_damage_is_taken_for_a_run(whole):
    mutations = corpus()
    assert len(mutations) >= 200
    refused = 0
    for what, data in mutations:
        try:
            assert data == whole or harmless(data, whole), what
        except DataError as error:
            refused += 1
            text = str(error)
            assert "'j'" in text and ("record " in text or "header" in text or "version" in text
                                      or "is no journal" in text), (what, text)  # fmt: skip
    assert refused > 0.8 * len(mutations)  # the others are cuts, and losses at the very end


def test_a_flipped_bit_names_its_record():
    first, parts = sealed(sample_records())
    for n in range(len(parts)):
        for place in (0, 5, 9, 15, len(parts[n]) // 2, len(parts[n]) - 3):
            bad = bytearray(parts[n])
            bad[place] ^= 4
            data = b"".join([first, *parts[:n], bytes(bad), *parts[n + 1 :]])
            with pytest.raises(DataError, match=rf"'j': record {n} \(at byte \d+, generation \d\)"):
                parse(data, "j")


def test_a_cut_anywhere_loses_one_record_at_most():
    first, parts = sealed(sample_records())
    data, ends = first + b"".join(parts), [len(first)]
    for part in parts:
        ends.append(ends[-1] + len(part))
    for at in range(len(first), len(data)):
        journal = parse(data[:at], "j")
        kept = sum(end <= at for end in ends) - 1
        assert len(journal.records) == kept and journal.whole_bytes == ends[kept]
        assert (journal.torn is None) == (at in ends)
    for at in range(len(first)):
        with pytest.raises(DataError):
            parse(data[:at], "j")


def test_zeros_that_a_file_system_left_are_a_torn_end(whole):
    """A file that grew before its content came, as after a loss of power."""
    for tail in (bytes(190), bytes(5000), bytes(3)):
        journal = parse(whole + tail, "j")
        assert journal.torn is not None and len(journal.records) == len(sample_records())
    first, parts = sealed(sample_records())
    last = parts[-1][:15] + bytes(len(parts[-1]) - 15)
    assert parse(b"".join([first, *parts[:-1], last]), "j").torn is not None


def refused_in(records: list[Record], header: JournalHeader, match: str) -> None:
    first, parts = sealed(records, header)
    with pytest.raises(DataError, match=match):
        parse(first + b"".join(parts), "j")


BAD_RECORDS = {
    "a gap": ([generation(0), generation(2)], "record 1 .*generation 2: records miss"),
    "swapped": ([generation(1), generation(0)], "record 0 .*swapped"),
    "another population": ([generation(0, coefficients=np.ones(5, "f4"))], "5 coefficients for 6"),
    "an infinite coefficient": (
        [generation(0, coefficients=np.array([np.inf] * 6, "f4"))],
        "record 0 .*not finite",
    ),
    "a sigma of nan": ([generation(0, sigma=float("nan"))], "record 0 .*sigma"),
    "an alpha that decays past the anchor": ([generation(0, alpha=0.5)], "record 0 .*Lower lambda"),
    "an early mark": ([generation(0), MarkRecord(0, "0" * 16)], "record 1 .*generation 0"),
    "an index out of range": (
        [generation(0, members=((1, 2**31),) * 6)],
        "record 0 .*index is 2147483648",
    ),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_sense_is_checked_beside_the_check_values(case):
    """Records that were sealed properly and still say what no run does."""
    refused_in(*[BAD_RECORDS[case][0], HEADER, BAD_RECORDS[case][1]])


def resealed(kind: int, payload: bytes) -> bytes:
    first = form.encode_header(HEADER)
    return first + form.seal(first[-form.CHECK_BYTES :], kind, payload)[0]


@pytest.mark.parametrize(
    ("kind", "payload"),
    [(0, b""), (7, b"abc"), (1, b""), (1, bytes(50)), (2, b"[]"), (2, b"{"), (2, b"\xff"),
     (3, b"1"), (2, b'{"generation": "0", "changes": {}}'), (2, b"[" * 100_000),
     (1, form.encode(generation(0))[1][:-1]), (1, form.encode(generation(0))[1] + b"\0"),
     (1, form.encode(generation(0))[1][:33] + b"\xff" + form.encode(generation(0))[1][34:]),
     (1, form.encode(generation(0))[1][:24] + b"\x07" + form.encode(generation(0))[1][25:])],
)  # fmt: skip
def test_nonsense_with_right_check_values_is_refused(kind, payload):
    with pytest.raises(DataError, match="record 0"):
        parse(resealed(kind, payload), "j")


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"null", b"[" * 100_000, b'{"base": 1}', zlib.compress(b"x")],
)
def test_a_header_of_nonsense_is_refused(content):
    packed = zlib.compress(content)
    data = form.PREFIX.pack(form.MAGIC, form.FORMAT_VERSION, 1, len(packed)) + packed
    with pytest.raises(DataError, match="header"):
        parse(data + form.check_of(b"", data), "j")


@settings(max_examples=150, deadline=None)
@given(kind=st.integers(0, 4), payload=st.binary(max_size=300))
def test_any_payload_is_read_or_refused(kind, payload):
    try:
        parse(resealed(kind, payload), "j")
    except DataError as error:
        assert "record 0" in str(error)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300), headed=st.booleans())
def test_any_bytes_are_read_or_refused(data, headed):
    start = form.MAGIC + struct.pack("<HH", form.FORMAT_VERSION, 1) if headed else b""
    with pytest.raises(DataError):
        parse(start + data, "j")


def test_a_damaged_export_is_refused(tmp_path, whole):
    (tmp_path / "j").write_bytes(whole)
    export_journal(read_journal(tmp_path / "j"), tmp_path / "e")
    data = (tmp_path / "e").read_bytes()
    changed = [*flips(data, 100), *byte_edits(data, 20)]
    for what, bad in changed:
        (tmp_path / "bad").write_bytes(bad)
        if bad == data:
            continue
        with pytest.raises(DataError, match=r"damaged|no journal|version"):
            pytest.fail(f"{what}: {read_journal(tmp_path / 'bad')}")


def test_a_missing_journal_is_said(tmp_path):
    with pytest.raises(DataError, match="cannot read the journal"):
        read_journal(tmp_path)
    with pytest.raises(DataError, match="there is no journal"):
        JournalWriter.resume(tmp_path)


# --- writing ----------------------------------------------------------------------------------


def test_a_journal_is_made_once(tmp_path):
    path = written(tmp_path / "j", [])
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        JournalWriter.create(path, HEADER)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["j"]


def test_one_process_writes_at_a_time(tmp_path):
    with JournalWriter.create(tmp_path / "j", HEADER) as writer:
        with pytest.raises(StateError, match="another process"):
            JournalWriter.resume(tmp_path / "j")
        writer.append(generation(0))
    with JournalWriter.resume(tmp_path / "j") as writer:
        assert writer.generation == 1
    with pytest.raises(StateError, match="closed"):
        writer.append(generation(1))


def test_a_torn_end_is_cut_off_when_the_run_goes_on(tmp_path, whole):
    path = tmp_path / "j"
    path.write_bytes(whole[:-30])
    with JournalWriter.resume(path) as writer:
        assert writer.journal.torn is not None and "record 11" in writer.journal.torn
        writer.append(MarkRecord(9, "1" * 16))
    assert path.read_bytes() == whole


def test_nothing_is_left_of_a_torn_end(tmp_path):
    """A torn record that is longer than what is written next."""
    path = written(tmp_path / "j", [generation(n) for n in range(4)])
    path.write_bytes(path.read_bytes()[:-1])
    with JournalWriter.resume(path) as writer:
        writer.append(MarkRecord(3, "1" * 16))
    journal = read_journal(path)
    assert journal.torn is None and same(journal.records[-1], MarkRecord(3, "1" * 16))


@pytest.mark.parametrize("bad", [generation(5), MarkRecord(3, "0" * 16), SegmentRecord(1, {})])
def test_a_record_out_of_order_is_not_written(tmp_path, bad):
    with JournalWriter.create(tmp_path / "j", HEADER) as writer:
        before = (tmp_path / "j").read_bytes()
        with pytest.raises(StateError, match="apart"):
            writer.append(bad)
        assert (tmp_path / "j").read_bytes() == before


def test_what_could_not_be_read_is_not_written(tmp_path):
    with JournalWriter.create(tmp_path / "j", HEADER) as writer:
        with pytest.raises(StateError, match="5 coefficients for 6 draws"):
            writer.append(generation(0, coefficients=np.ones(5, "f4")))
        writer.append(generation(0))
    assert len(read_journal(tmp_path / "j").generations) == 1


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path):
    """A real limit on the size of files: the write stops in the middle of a record."""
    path = tmp_path / "j"
    with JournalWriter.create(path, HEADER) as writer:
        writer.append(generation(0))
        before = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))
        try:
            with pytest.raises(
                EsfastError, match=r"cannot write .*What was written before is whole"
            ):
                writer.append(generation(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
        writer.append(generation(1))
    assert len(read_journal(path).generations) == 2


def test_a_sync_that_fails_takes_the_record_back(tmp_path, monkeypatch):
    path = tmp_path / "j"
    with JournalWriter.create(path, HEADER) as writer:
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "I/O error")))
            with pytest.raises(EsfastError, match="I/O error"):
                writer.append(generation(0))
        assert path.read_bytes() == before
        writer.append(generation(0))


def interrupting(number):
    """A profile function that raises KeyboardInterrupt at the n-th call or return inside esfast."""
    seen = 0

    def profile(frame, event, argument):
        nonlocal seen
        if "esfast" in Path(frame.f_code.co_filename).parts and event != "c_call":
            seen += 1
            if seen == number:
                raise KeyboardInterrupt

    return profile


def test_an_interrupt_anywhere_leaves_a_whole_journal(tmp_path):
    """Ctrl-C at any call of append: the record is there or it is not, and the next one fits."""
    number, interrupted = 0, True
    while interrupted:
        number += 1
        path = tmp_path / str(number)
        with JournalWriter.create(path, HEADER) as writer:
            writer.append(generation(0))
            interrupted = False
            sys.setprofile(interrupting(number))
            try:
                writer.append(generation(1))
            except KeyboardInterrupt:
                interrupted = True
            finally:
                sys.setprofile(None)
            done = writer.generation
            writer.append(MarkRecord(done, "1" * 16))
        journal = read_journal(path)
        assert journal.torn is None and len(journal.generations) == done
        assert done in (1, 2) and isinstance(journal.records[-1], MarkRecord), number
    assert number > 15 and done == 2


def test_a_record_is_synced_before_append_returns(tmp_path, monkeypatch):
    events: list[str] = []
    write, sync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda *a: events.append("write") or write(*a))
    monkeypatch.setattr(os, "fsync", lambda *a: events.append("sync") or sync(*a))
    with JournalWriter.create(tmp_path / "j", HEADER) as writer:
        assert events == ["write", "sync", "sync"]  # the header, then the folder's entry
        events.clear()
        writer.append(generation(0))
    assert events == ["write", "sync"]
    events.clear()
    JournalWriter.resume(tmp_path / "j").close()
    assert events == ["sync"]  # its last record may never have been


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(EsfastError, match="no such folder"):
        JournalWriter.create(tmp_path / "nowhere" / "j", HEADER)
