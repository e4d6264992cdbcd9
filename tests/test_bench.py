"""`esfast bench`: complete rows, what they count, files that merge, and flags that are refused.

No timing is looked at, except as numbers that other numbers follow from.
"""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import run

from esfast import _core
from esfast.bench import peers, workload
from esfast.bench.measure import CACHED, Timing, measure, variants
from esfast.bench.rows import (
    COLUMNS,
    KEY,
    TORCH_KERNEL,
    Limits,
    Row,
    Stamp,
    merge_csv,
    read_csv,
    rows_of,
)
from esfast.bench.show import quiet_note, short
from esfast.bench.traffic import drawn, moved, normals
from esfast.bench.workload import CACHE, CYCLE, EXCHANGE, MIRROR, TORCH, UPDATE, Bench, Case
from esfast.errors import DataError, EsfastError
from esfast.whole_file import whole_file

SMALL = ["--parameters", "3000", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits over tables of a few thousand weights."""
    from esfast.bench import measure as module

    monkeypatch.setattr(module, "CACHED", {"cpu": 1 << 12, "cuda": 1 << 12})
    monkeypatch.setattr(module, "LIMIT_CALLS", 1)


def stamp() -> Stamp:
    return Stamp("abc", "2026-01-01", "a machine", 0.1, 1, "a table")


def some_rows() -> list[Row]:
    bench = Bench(workload.shapes_of_count(2000), "bfloat16", 1)
    target = _core.target()
    cases = [
        Case(CYCLE, "gaussian", "bfloat16", "lean", 1, target),
        Case(UPDATE, "hadamard", "bfloat16", "shadow", 32, target),
        Case("checksum", "none", "bfloat16", "lean", 1, target),
    ]
    return rows_of(measure(variants(bench, cases), 1), stamp())


# ---- what is measured --------------------------------------------------------------------------


def test_every_kernel_has_a_whole_row() -> None:
    rows = some_rows()
    found = {(row.kernel, row.noise, row.memory, row.population): row for row in rows}
    assert len(found) == len(rows)
    for kernel in ("perturb", EXCHANGE, MIRROR, "restore", CYCLE):
        row = found[kernel, "gaussian", "lean", 1]
        assert row.limit in ("bandwidth", "issue") and row.share_of_limit and row.times_peer
        assert row.share_of_limit == max(row.share_of_bandwidth or 0, row.share_of_issue or 0)
        theirs = found[TORCH_KERNEL.get(kernel, kernel), "gaussian", TORCH, 1]
        assert theirs.times_peer == 1
        assert row.times_peer == pytest.approx(theirs.ns_per_parameter / row.ns_per_parameter, 0.01)
    update = found[UPDATE, "hadamard", "shadow", 32]
    peer = found[UPDATE, "gaussian", TORCH, 30]
    assert update.times_peer == pytest.approx(peer.ns_per_parameter / update.ns_per_parameter, 0.01)
    assert update.normals_per_s == pytest.approx(32e9 / update.ns_per_parameter, 0.01)
    checksum = found["checksum", "none", "lean", 1]
    assert checksum.limit == "bandwidth" and checksum.times_peer is None
    assert checksum.normals_per_s is None and checksum.share_of_issue is None
    for name in ("copy", "read-modify-write", "read"):
        assert found[name, "none", "buffer", 1].gb_per_s
    assert {row.kernel for row in rows if row.memory == CACHE} == {"perturb", UPDATE}


def test_the_limit_that_binds_is_the_one_that_takes_longer() -> None:
    """1 ns a byte; 10 ns a value in perturb, 6 ns a value in a large update: 6 bind."""
    target = _core.target()
    buffer = Case("bandwidth", "none", "bfloat16", "buffer")
    cached = Case(CYCLE, "gaussian", "bfloat16", CACHE, 1, target)
    timings = [
        Timing(buffer, "copy", 1000, 8e-6),
        Timing(buffer, "read-modify-write", 1000, 4e-6),  # 4 B a parameter
        Timing(buffer, "read", 1000, 1e-6),
        Timing(cached, "perturb", 1000, 10e-6),
        Timing(replace(cached, kernel=UPDATE, population=128), UPDATE, 1000, 768e-6),
        Timing(Case(CYCLE, "gaussian", "bfloat16", "lean", 1, target), "perturb", 1000, 20e-6),
        Timing(Case(CYCLE, "gaussian", "bfloat16", "shadow", 1, target), "restore", 1000, 5e-6),
        Timing(Case(UPDATE, "gaussian", "bfloat16", "lean", 30, target), UPDATE, 1000, 240e-6),
        Timing(Case("checksum", "none", "bfloat16", "lean", 1, target), "checksum", 1000, 2e-6),
    ]
    perturb, restore, update, checksum = rows_of(timings, stamp())[5:]
    assert (perturb.limit, perturb.share_of_issue, perturb.share_of_bandwidth) == (
        "issue",
        0.3,
        0.2,
    )
    assert (restore.limit, restore.share_of_limit) == ("bandwidth", 0.8)
    assert (update.limit, update.share_of_limit) == ("issue", pytest.approx(180 / 240, 0.001))
    assert (checksum.limit, checksum.share_of_limit) == ("bandwidth", 0.5)
    assert Limits(timings).bytes_per_second("perturb") == pytest.approx(1e9)


def test_medians_of_kernels_and_the_least_of_limits() -> None:
    from esfast.bench.measure import Variant

    values = iter([99.0, 3.0, 1.0, 2.0])
    ours = Variant(Case(UPDATE, "none", "bfloat16", "lean"), 1, lambda: {"update": next(values)})
    least = iter([0.0, 3.0, 1.0, 2.0])
    limit = Variant(Case("b", "none", "bfloat16", "buffer"), 1, lambda: {"copy": next(least)})
    seconds = {timing.kernel: timing.seconds for timing in measure([ours, limit], 3)}
    assert seconds == {"update": 2.0, "copy": 1.0}  # the first round does not count


def test_the_target_and_the_weights_are_as_before() -> None:
    before = _core.target()
    bench = Bench(workload.shapes_of_count(2000), "float32", 1)
    cases = [Case(CYCLE, "gaussian", "float32", "lean", 1, name) for name in _core.targets()]
    checksum = bench.weights("lean").checksum()
    chosen = [v for v in variants(bench, cases) if v.case.memory == "lean"]
    measure(chosen, 1)
    assert _core.target() == before
    assert bench.weights("lean").checksum() == checksum


def test_an_exception_puts_the_target_back() -> None:
    before = _core.target()
    bench = Bench(workload.shapes_of_count(500), "float32", 1)
    case = Case(CYCLE, "gaussian", "float32", "lean", 1, "scalar")

    def stop(_: str) -> None:
        if _core.target() == "scalar":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(variants(bench, [case]), 1, stop)
    assert _core.target() == before


# ---- what it costs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "memory", "noise", "population", "nbytes", "draws", "values"),
    [
        ("perturb", "lean", "gaussian", 1, 4, 1, 1),
        ("restore", "lean", "gaussian", 1, 4, 1, 1),
        (EXCHANGE, "lean", "gaussian", 1, 4, 2, 2),
        (MIRROR, "lean", "gaussian", 1, 4, 1, 1),
        (CYCLE, "lean", "gaussian", 1, 8, 2, 2),
        ("perturb", "shadow", "gaussian", 1, 4, 1, 1),
        ("restore", "shadow", "gaussian", 1, 4, 0, 0),
        (CYCLE, "shadow", "gaussian", 1, 8, 1, 1),
        ("perturb", "master", "gaussian", 1, 6, 1, 1),
        (UPDATE, "lean", "gaussian", 30, 4, 30, 30),
        (UPDATE, "shadow", "rademacher", 30, 6, 30, 30),
        (UPDATE, "master", "gaussian", 30, 10, 30, 30),
        (UPDATE, "lean", "hadamard", 32, 4, 1, 32),
        (UPDATE, "lean", "hadamard", 33, 4, 2, 33),
        ("perturb", TORCH, "gaussian", 1, 12, 1, 1),
        (CYCLE, TORCH, "gaussian", 1, 24, 2, 2),
        (UPDATE, TORCH, "gaussian", 30, 864, 30, 30),
        ("checksum", "lean", "none", 1, 2, 0, 0),
    ],
)
def test_bytes_and_draws_a_parameter(
    kernel: str, memory: str, noise: str, population: int, nbytes: int, draws: int, values: int
) -> None:
    case = Case(kernel, noise, "bfloat16", memory, population)
    assert (moved(case, kernel), drawn(case, kernel)) == (nbytes, draws)
    assert normals(case, kernel) == values


def test_the_torch_loops_do_what_they_say() -> None:
    """w + step * sum_n c_n * noise_n, with one generator a tensor; and a perturbation."""
    weight = torch.zeros(64, dtype=torch.bfloat16)
    peers.update([weight], [3, 4], [2.0, -1.0], step=0.5)
    noises = [peers.draw(weight, seed).float() for seed in (3, 4)]
    assert torch.equal(weight, (0.5 * (2 * noises[0] - noises[1])).bfloat16())
    peers.perturb([weight], 3, 0.0)
    assert torch.equal(weight, (0.5 * (2 * noises[0] - noises[1])).bfloat16())


# ---- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [1, 575, 577, 5000, 4_000_001, 134_515_008, 8_030_000_001])
def test_a_table_has_as_many_parameters_as_asked_for(parameters: int) -> None:
    shapes = workload.shapes_of_count(parameters)
    assert workload.count(shapes) == parameters
    assert all(size > 0 for shape in shapes.values() for size in shape)
    assert len(shapes) < 1000


def test_the_default_models_shapes_and_their_sixteenth() -> None:
    whole = workload.shapes_of_model("smollm2-135m")
    assert workload.count(whole) == 134_515_008
    part = workload.sixteenth(whole)
    expected = workload.llama_shapes(layers=2, rows=3072)
    matrices = [{k: v for k, v in shapes.items() if len(v) > 1} for shapes in (part, expected)]
    assert matrices[0] == matrices[1]


def test_another_models_shapes_need_no_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    shapes = workload.shapes_of_model(str(tmp_path))
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (8, 16)
    assert "lm_head.weight" not in shapes  # tied: one tensor


# ---- files -------------------------------------------------------------------------------------


def test_rows_merge_by_key(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    rows = some_rows()
    merge_csv(path, rows)
    assert len(read_csv(path)) == len(rows)
    other = replace(rows[-1], threads=64)
    newer = replace(rows[0], commit="newer")
    merge_csv(path, [newer, other])
    read = read_csv(path)
    assert len(read) == len(rows) + 1
    assert [row["commit"] for row in read].count("newer") == 1
    keys = [tuple(row[name] for name in KEY) for row in read]
    assert len(set(keys)) == len(keys)
    before = path.read_bytes()
    merge_csv(path, [newer, other])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["kernels.csv"]


def test_rows_are_ordered_by_number(tmp_path: Path) -> None:
    row = some_rows()[-1]
    merge_csv(tmp_path / "a.csv", [replace(row, population=n) for n in (128, 30, 8)])
    assert [r["population"] for r in read_csv(tmp_path / "a.csv")] == ["8", "30", "128"]


@pytest.mark.parametrize(
    "content", [b"", b"a,b\n1,2\n", b"\xff\xfe\x00", ",".join(COLUMNS).encode() + b"\n1,2\n"]
)
def test_a_csv_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match="another file with --csv"):
        merge_csv(path, some_rows())
    assert path.read_bytes() == content


def test_a_whole_file_appears_or_does_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with whole_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(EsfastError, match="cannot write"), whole_file(tmp_path / "no" / "file"):
        pass


# ---- the command -------------------------------------------------------------------------------


def test_the_command_prints_and_stores(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    files = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "json", "plot")}
    flags = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    threads = torch.get_num_threads()
    grid = ["--dtype", "bfloat16", "float32", "--population", "8", "30"]
    assert run("bench", *SMALL, *grid, *flags) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert "update 32" in out and "read-modify-write" in out and "checksum" in out
    assert "update 8, 1/" in out  # of torch: a part of the table
    assert all(len(line) <= 80 for line in out.splitlines()[2:])
    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    stored = json.loads(files["json"].read_text())
    assert stored["made"]["command"].startswith("esfast bench --parameters 3000")
    assert len(stored["rows"]) == len(rows)
    cases = {(r["kernel"], r["noise"], r["dtype"], r["memory"], r["population"]) for r in rows}
    for dtype in ("bfloat16", "float32"):
        for memory in ("lean", "shadow"):
            for noise in ("gaussian", "rademacher", "hadamard"):
                assert (CYCLE, noise, dtype, memory, "1") in cases
                for population in ("8", "32" if noise == "hadamard" else "30"):
                    assert (UPDATE, noise, dtype, memory, population) in cases
    assert {r["table"] for r in rows} == {"3000 parameters"}
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_only_keeps_what_matches(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert run("bench", *SMALL, "--only", "^update-gaussian.*lean-8", "--json", str(path)) == 0
    rows = json.loads(path.read_text())["rows"]
    ours = [row for row in rows if row["memory"] not in ("buffer", CACHE, TORCH)]
    assert [(row["kernel"], row["population"]) for row in ours] == [(UPDATE, 8)]
    assert {row["population"] for row in rows if row["memory"] == TORCH} == {8}


REFUSED = {
    "an unknown dtype": (["--dtype", "int8"], "invalid choice: 'int8'"),
    "an unknown noise": (["--noise", "pink"], "invalid choice: 'pink'"),
    "an unknown target": (["--targets", "sse2"], "invalid choice: 'sse2'"),
    "no rounds": (["--rounds", "0"], "'0' is not a whole number of 1 or more"),
    "no members": (["--population", "0"], "'0' is not a whole number of 1 or more"),
    "no threads": (["--threads", "-1"], "'-1' is not from 1 to 1024"),
    "no parameters": (["--parameters", "0"], "'0' is not a number such as"),
    "a word for a number": (["--parameters", "many"], "'many' is not a number such as"),
    "two tables": (["--parameters", "10", "--model", "smollm2-135m"], "not allowed with"),
    "an unknown model": (["--model", "no/such/model"], "no/such/model"),
    "a bad pattern": ([*SMALL, "--only", "("], "is no regular expression"),
    "a pattern of nothing": ([*SMALL, "--only", "fly"], "no case's name matches"),
    "an unknown device": ([*SMALL, "--device", "abacus"], "--device 'abacus' cannot be used"),
    "a meta device": ([*SMALL, "--device", "meta"], "neither a CPU nor a CUDA device"),
    "a missing folder": ([*SMALL, "--json", "no/such/file"], "--json no/such/file is no file"),
    "a folder for a file": ([*SMALL, "--csv", "."], "--csv . is no file"),
    "a plot of nothing": ([*SMALL, "--only", "checksum", "--plot", "a.png"], "--plot shows noise"),
    "too many parameters": (["--parameters", "900000B"], "--memory lean alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_mended_is_one_paragraph_and_exit_code_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, expected = REFUSED[case]
    assert run("bench", *arguments) == 2
    out, err = capsys.readouterr()
    assert expected in err and out == ""
    assert len(err.splitlines()) == 1 and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_busy_machine_is_noted() -> None:
    assert quiet_note(0.2, 2) is None and quiet_note(None, 2) is None
    assert "2.5 on 2 cores" in (quiet_note(2.5, 2) or "")


def test_rates_are_short() -> None:
    assert [short(v) for v in (1.234e12, 5.6e9, 7e6, 12345.0, 0.5)] == [
        "1.23 T", "5.6 G", "7 M", "12.3 k", "0.5",
    ]  # fmt: skip


def test_the_cached_table_fits_the_smallest_cache_of_a_supported_gpu() -> None:
    assert CACHED["cuda"] * torch.bfloat16.itemsize * 2 <= 40e6


def test_cuda_without_a_number_is_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device takes no "cuda" alone."""
    from esfast.bench.command import _device

    chosen: list[torch.device] = []
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert (_device("cuda"), _device("cuda:1")) == ("cuda", "cuda:1")
    assert chosen == [torch.device("cuda:1")]
