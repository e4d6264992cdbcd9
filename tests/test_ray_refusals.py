"""Flags of --launcher that do not go together, and a Ray that is not there; no cluster needed."""

from __future__ import annotations

import sys

import pytest
from test_cli import run

TRAIN = ("train", "--model", "nowhere")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--engines", "2"), "--engines goes with --launcher ray"),
        (("--launcher", "slurm"), "invalid choice: 'slurm'"),
        (("--launcher", "ray", "--engines", "0"), "whole number of 1 or more"),
        (("--reward-memory", "-1"), "a number of 0 or more"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, monkeypatch, capfd, flags, complaint):
    monkeypatch.chdir(tmp_path)
    assert run(*TRAIN, *flags) == 2
    told = capfd.readouterr().err
    assert complaint in told and len(told.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_ray_that_is_not_installed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(*TRAIN, "--launcher", "ray") == 2
    told = capfd.readouterr().err
    assert "pip install ray" in told and len(told.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_ray_under_torchrun(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert run(*TRAIN, "--launcher", "ray") == 2
    assert "without torchrun" in capfd.readouterr().err
