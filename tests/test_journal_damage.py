"""A corpus of damaged journals: each is refused by name, or read as the original's beginning."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journals import HEADER, WHOLE, generation, same, sample_records, sealed, whole

from esfast import DataError
from esfast import journal_format as form
from esfast.journal import JournalWriter, export_journal, parse, read_journal
from esfast.journal_format import JournalHeader, MarkRecord, Record

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


def test_no_damage_is_taken_for_a_run():
    mutations = corpus()
    assert len(mutations) >= 200
    refused = 0
    for what, data in mutations:
        try:
            assert data == WHOLE or harmless(data, WHOLE), what
        except DataError as error:
            refused += 1
            text = str(error)
            assert "'j'" in text and ("record " in text or "header" in text or "version" in text
                                      or "is no journal" in text), (what, text)  # fmt: skip
            assert what != "another noise" or "has noise version 9" in text
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


def test_zeros_that_a_file_system_left_are_a_torn_end():
    """A file that grew before its content came, as after a loss of power."""
    for tail in (bytes(190), bytes(5000), bytes(3)):
        journal = parse(WHOLE + tail, "j")
        assert journal.torn is not None and len(journal.records) == len(sample_records())
    first, parts = sealed(sample_records())
    last = parts[-1][:15] + bytes(len(parts[-1]) - 15)
    assert parse(b"".join([first, *parts[:-1], last]), "j").torn is not None


def refused_in(records: list[Record], header: JournalHeader, match: str) -> None:
    with pytest.raises(DataError, match=match):
        parse(whole(records, header), "j")


BAD_RECORDS = {
    "a gap": ([generation(0), generation(2)], "record 1 .*generation 2: records miss"),
    "swapped": ([generation(1), generation(0)], "record 0 .*swapped"),
    "another population": ([generation(0, coefficients=np.ones(5, "f4"))], "5 coefficients for 6"),
    "an infinite coefficient": (
        [generation(0, coefficients=np.array([np.inf] * 6, "f4"))],
        "record 0 .*not finite",
    ),
    "a sigma of nan": ([generation(0, sigma=float("nan"))], "record 0 .*sigma"),
    "a sigma of zero": ([generation(0, sigma=0.0)], "record 0 .*sigma"),
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
     (2, b'{"generation": 0, "changes": []}'),
     (1, form.encode(generation(0))[1][:33] + b"\x0d" + form.encode(generation(0))[1][34:]),
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


@settings(max_examples=150)
@given(kind=st.integers(0, 4), payload=st.binary(max_size=300))
def test_any_payload_is_read_or_refused(kind, payload):
    try:
        parse(resealed(kind, payload), "j")
    except DataError as error:
        assert "record 0" in str(error)


@settings(max_examples=100)
@given(data=st.binary(max_size=300), headed=st.booleans())
def test_any_bytes_are_read_or_refused(data, headed):
    start = form.MAGIC + struct.pack("<HH", form.FORMAT_VERSION, 1) if headed else b""
    with pytest.raises(DataError):
        parse(start + data, "j")


def test_a_damaged_export_is_refused(tmp_path):
    (tmp_path / "j").write_bytes(WHOLE)
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
