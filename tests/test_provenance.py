"""What an artefact says of the machine that made it."""

from __future__ import annotations

import csv
import importlib.util
import os
from pathlib import Path

import pytest
import torch

import esfast
from esfast.provenance import commit, device_name, processor_name

GENOA = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC

processor\t: 1
model name\t: another
"""


RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
COMMITTED = sorted(RESULTS.rglob("*.csv"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_committed_row_has_its_commit_device_and_threads(path):
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert all(row.get(origin) for origin in ("commit", "device", "threads")), row


def test_what_gpu_kernels_measures_could_be_committed(tmp_path, monkeypatch):
    path = RESULTS.parent / "gpu_kernels.py"
    spec = importlib.util.spec_from_file_location("gpu_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    module.Rows(tmp_path / "kernels.csv").add("copy", 1000, 0.5, 2000.0)
    test_every_committed_row_has_its_commit_device_and_threads(tmp_path / "kernels.csv")


def test_a_copy_without_its_history_is_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(esfast, "__file__", str(tmp_path / "esfast" / "__init__.py"))
    monkeypatch.delenv("ESFAST_COMMIT", raising=False)
    assert commit() is None
    monkeypatch.setenv("ESFAST_COMMIT", "0123abc")
    assert commit() == "0123abc"


def test_processors_of_one_name_are_told_apart():
    turin = GENOA.replace(": 25", ": 26").replace(": 17", ": 2")
    assert processor_name(GENOA) == "AMD EPYC (family 25, model 17)"
    assert processor_name(turin) == "AMD EPYC (family 26, model 2)"


def test_a_machine_that_names_no_processor_has_a_name():
    assert processor_name("processor\t: 0\nBogoMIPS\t: 50.00\n") == ""
    assert device_name().endswith(f" x{os.cpu_count()}") and device_name()[0] not in " x("
