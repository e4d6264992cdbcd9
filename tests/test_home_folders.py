"""Names that begin with ~, and users who have no home."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_models import llama, save

from esfast import cli, model_cache
from esfast.checkpoint import save_model
from esfast.errors import EsfastError
from esfast.home_folders import at_home
from esfast.models import load_model

NOBODY = "~nobody-of-this-name"
FLAGS = {
    "train": ["--output={0}", "--resume={0}"],
    "grpo": ["--output={0}", "--resume={0}"],
    "fast-slow": ["--output={0}", "--resume={0}"],
    "continual": ["--output={0}", "--resume={0}"],
    "replay": ["{0}", "--base", "m", "--output={0}"],
    "apply": ["{0}", "--base", "m", "--output={0}"],
    "export-adapter": ["{0}", "--output={0}"],
    "forgetting": ["run", "--base", "m", "--output={0}"],
}


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container under a user that its password file does not know."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)


@pytest.mark.parametrize("command", FLAGS)
def test_a_tilde_that_the_shell_left_is_the_home_folder(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [word.format("~/run") for word in FLAGS[command]]
    args = cli.build_parser(command).parse_args([command, *words])
    places = {name: vars(args).get(name) for name in ("output", "resume", "journal")}
    assert {place for place in places.values() if place} == {str(tmp_path / "run")}


def test_a_name_that_no_model_is_written_under_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/run\xff")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--output", name])
    said = capsys.readouterr().err
    assert "--output" in said and "no UTF-8" in said
    assert not os.path.lexists(name)


def test_what_is_saved_over_is_what_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thing").write_text("")
    assert cli.main(["forgetting", "no-run", "--base", "m", "--output=~/used"]) == 2
    assert "used is there already" in capsys.readouterr().err


def test_a_tilde_that_is_nobodys_is_a_name_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(llama(), "base")
    loaded = load_model("base")
    assert save_model(loaded, f"{NOBODY}/model") == tmp_path / NOBODY / "model"
    assert (tmp_path / NOBODY / "model" / "config.json").is_file()
    assert at_home(f"{NOBODY}/x") == Path(NOBODY, "x")


@pytest.mark.parametrize("named", [None, "~/cache", f"{NOBODY}/cache"])
def test_a_cache_without_a_home_is_asked_for(
    named: str | None, homeless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ESFAST_CACHE", raising=False)
    if named is not None:
        monkeypatch.setenv("ESFAST_CACHE", named)
    with pytest.raises(EsfastError, match=r"no such home folder.*ESFAST_CACHE"):
        model_cache.cached_smollm2()
