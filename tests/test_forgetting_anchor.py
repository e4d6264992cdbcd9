"""`esfast forgetting` of runs whose decay pulled to another model than they started from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import run
from tiny_models import llama, save

from esfast import Anchor, AnchoredDecay, EvolutionStrategy, ParameterTable
from esfast.models import load_model
from esfast.replay import keep_journal

DECAY = AnchoredDecay("l2", 5.0)


def train(
    folder: Path,
    anchor: str | None,
    decay: AnchoredDecay | None = DECAY,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Two generations from "base" on, as `esfast train --anchor-model` leaves them."""
    loaded = load_model("base", dtype=dtype)
    table = ParameterTable.from_module(loaded.model)
    es = EvolutionStrategy(
        table, threads=1, sigma=0.02, alpha=0.02, population_size=6, decay=decay,
        anchor=Anchor.from_safetensors(anchor or "base", table) if decay else None,
    )  # fmt: skip
    folder.mkdir()
    with keep_journal(es, folder / "journal.esj", checksum_every=1):
        for number in range(2):
            es.step(np.random.default_rng(number).normal(size=6))
    config = {"arguments": {"task": "arithmetic", "anchor_model": anchor}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two models, and runs from the first: "far" pulls to the second, "near" to the first."""
    folder = tmp_path_factory.mktemp("anchors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, seed in (("base", 0), ("original", 1)):
            save(llama(seed, num_hidden_layers=1), name)
        train(Path("far"), "original")
        train(Path("near"), None)
        train(Path("free"), None, decay=None)
        train(Path("narrow"), "base", dtype=torch.bfloat16)
    return folder


def diagnosed(output: Path, *arguments: str) -> int:
    drift_alone = ("--no-kl", "--score", "0", "--no-plots", "--output", str(output))
    return run("forgetting", *arguments, "--base", "base", *drift_alone)


def norms(output: Path) -> list[float]:
    found = json.loads((output / "forgetting.json").read_text())
    return [subject["drift"][-1]["whole"]["norm"] for subject in found["subjects"]]


def test_the_anchor_is_the_one_that_the_run_recorded(there, tmp_path):
    assert diagnosed(tmp_path / "out", "far", "near") == 0
    far, near = norms(tmp_path / "out")
    assert far > 1.1 * near > 0


def test_the_base_named_as_the_anchor_is_the_start(there, tmp_path):
    """Its file is wider than the run's weights, and has another checksum."""
    assert diagnosed(tmp_path / "out", "narrow") == 0
    found = json.loads((tmp_path / "out" / "forgetting.json").read_text())
    assert len(found["subjects"][0]["noise_norms"]) == 3 and not found["notes"]


def test_the_law_of_the_norm_is_of_decay_to_the_start(there, tmp_path, capsys):
    """It knows of no pull to elsewhere; an anchor named that is the base itself changes nothing."""
    assert diagnosed(tmp_path / "out", "far", "near", "free") == 0
    found = json.loads((tmp_path / "out" / "forgetting.json").read_text())
    far, near, free = (subject["noise_norms"] for subject in found["subjects"])
    assert far is None and len(near) == len(free) == 3
    assert [note[:40] for note in found["notes"]] == ["far: the law of the norm is left out, wh"]
    assert "far: the law of the norm is left out" in capsys.readouterr().out
    assert diagnosed(tmp_path / "same", "near", "--anchor-model", "base") == 0
    found = json.loads((tmp_path / "same" / "forgetting.json").read_text())
    assert found["subjects"][0]["noise_norms"] == near and found["notes"] == []


def test_a_journal_alone_needs_the_flag_and_says_so(there, tmp_path, capsys):
    alone = tmp_path / "alone.esj"
    alone.write_bytes(Path("far/journal.esj").read_bytes())
    assert diagnosed(tmp_path / "none", str(alone)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the anchor has checksum" in said and "Name it with --anchor-model" in said
    assert diagnosed(tmp_path / "out", str(alone), "near", "--anchor-model", "original") == 0
    assert diagnosed(tmp_path / "folder", "far", "near") == 0
    assert norms(tmp_path / "out") == norms(tmp_path / "folder")


def test_the_flag_goes_before_a_record_of_another_place(there, tmp_path):
    """A run that was moved: what its config.json names is not there, or is another model."""
    for number, recorded in enumerate(("nowhere", "base")):
        moved = tmp_path / f"moved-{number}"
        moved.mkdir()
        (moved / "journal.esj").write_bytes(Path("far/journal.esj").read_bytes())
        (moved / "config.json").write_text(json.dumps({"arguments": {"anchor_model": recorded}}))
        output = tmp_path / f"out-{number}"
        assert diagnosed(output, str(moved)) == 2
        assert diagnosed(output, str(moved), "--anchor-model", "original") == 0


def test_an_anchor_that_nothing_pulls_to_is_refused(there, tmp_path, capsys):
    assert diagnosed(tmp_path / "out", "free", "--anchor-model", "original") == 2
    assert "leave it out" in capsys.readouterr().err
