"""Imports go down only: the floors of the house, read from the source with ast.

0 the compiled core · 1 standard library and numpy · 2 torch · 3 the world outside, imported where
it is used · 4 the loop · 5 what a user types.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import esfast

ROOT = Path(esfast.__file__).parent
FLOORS = {
    "_core": 0,
    "errors": 1, "members": 1, "shaping": 1, "strategy": 1, "update": 1, "journal": 1,
    "journal_format": 1, "bounds": 1, "whole_file": 1, "home_folders": 1, "interrupts": 1,
    "member_loop": 1,
    "parameters": 2, "segments": 2, "weights": 2, "anchor": 2, "checkpoint": 2, "resources": 2,
    "stored_names": 2, "held_tensors": 2, "outside_edits": 2,
    "state_file": 2, "live_weights": 2,
    "snapshots": 2, "device_table": 2, "device_shaping": 2, "anchor_stream": 2,
    "evolution": 3, "replay": 3, "engines": 3, "tasks": 3, "launch": 3, "forgetting": 3,
    "cost": 3, "held_out": 3, "measure": 3, "provenance": 3,
    "models": 3, "model_cache": 3, "conversion": 3,
    "train": 4, "fast_slow": 4, "run_folder": 4, "loggers": 4, "progress": 4,
    "rollout": 4, "failures": 4, "training_run": 4, "prompt_room": 4, "disk_room": 4, "grpo": 4,
    "grpo_trl": 4, "prior": 4, "continual": 4,
    "cli": 5, "plots": 5, "bench": 5, "__main__": 5, "info": 5, "report": 5, "train_command": 5,
    "grpo_command": 5, "diagnosis": 5,
    "train_flags": 5, "replay_command": 5, "resume": 5, "html_report": 5, "report_command": 5,
    "ray_command": 5, "opening": 5, "lasting_output": 5, "idle_flags": 5,
    "continual_command": 5, "fast_slow_command": 5, "continual_plots": 5,
}  # fmt: skip
OUTSIDE = {"numpy": 1, "torch": 2, "safetensors": 2}  # everything else from outside: floor 3
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path) -> list[tuple[str, bool]]:
    """Absolute dotted names imported by a file, and whether at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    package = ["esfast", *path.relative_to(ROOT).parts[:-1]]
    out: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{a.name}" for a in node.names] if module == "esfast" else [module]
            out += [(name, id(node) in top) for name in names]
    return out


def floor_of(name: str) -> int:
    """The floor of an imported name; the standard library lies below everything. The package
    itself, whose public names reach up to EvolutionStrategy, is floor 3."""
    first, *rest = name.split(".")
    if first == "esfast":
        return FLOORS.get(rest[0], 3) if rest else 3
    return 0 if first in sys.stdlib_module_names else OUTSIDE.get(first, 3)


def test_every_file_has_a_floor() -> None:
    unknown = sorted({room(path) for path in FILES} - FLOORS.keys())
    assert not unknown, f"say in FLOORS where these belong: {unknown}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    mine = FLOORS.get(room(path), 5)
    climbing = [f"{name} (floor {floor_of(name)})" for name, _ in imports(path)
                if floor_of(name) > mine]  # fmt: skip
    assert not climbing, f"{path.name} is on floor {mine} and imports {climbing}"


def test_the_check_sees_a_climb() -> None:
    """Guards the two functions above against seeing nothing at all."""
    assert floor_of("esfast.train") == 4 and floor_of("transformers.models") == 3
    assert floor_of("torch.nn") == 2 and floor_of("os.path") == 0
    names = {name for path in FILES for name, _ in imports(path)}
    assert "torch" in names and any(name.startswith("esfast.") for name in names)


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(); print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


HEAVY = {
    "transformers", "vllm", "ray", "gepa", "reasoning_gym", "matplotlib", "tensorboard", "trl",
    "datasets", "lm_eval",
}  # fmt: skip


@pytest.mark.parametrize(
    "statement",
    [
        "import esfast; esfast.read_journal; esfast.noise; esfast.Strategy",
        "from esfast.cli import main; main(['info'])",
        "from esfast.cli import build_parser; build_parser('')",
    ],
)
def test_what_needs_no_torch_brings_none(statement: str) -> None:
    assert not loaded_by(statement) & {*HEAVY, "torch"}


def test_the_flags_of_all_commands_bring_no_heavy_package() -> None:
    loaded = loaded_by("from esfast import *; from esfast.cli import build_parser; build_parser()")
    assert "torch" in loaded and not loaded & HEAVY


def test_every_public_name_is_there_when_it_is_asked_for() -> None:
    assert set(esfast.__all__) >= set().union(*esfast._ROOMS.values())
    assert all(getattr(esfast, name) is not None for name in esfast.__all__)
    assert set(esfast.__all__) <= set(dir(esfast))
    assert loaded_by("import esfast; esfast.shaping.rank; esfast.engines") >= {"esfast"}
    with pytest.raises(AttributeError, match="'esfast' has no attribute 'weight'"):
        esfast.weight  # noqa: B018


def test_the_core_brings_no_torch() -> None:
    """csrc includes neither torch nor, outside the binding file, Python."""
    sources = Path(__file__).parents[1] / "csrc"  # beside the tests, wherever esfast is installed
    assert (sources / "noise.hpp").is_file()
    for path in sources.rglob("*.[ch]*"):
        text = path.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.lstrip().startswith("#include")]
        bad = [line for line in lines if "torch" in line or "ATen" in line or "c10" in line]
        if path.name not in ("module.cpp", "bind.cpp", "bind.hpp"):
            bad += [line for line in lines if "pybind11" in line or "Python.h" in line]
        assert not bad, (path.name, bad)
