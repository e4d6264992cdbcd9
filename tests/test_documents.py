"""The documents' Python runs as it stands there, over a tiny model."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import esfast
from esfast.cli import main
from esfast.engines.transformers import TransformersEngine
from esfast.forgetting import laws
from esfast.models import load_model

SOURCES = Path(__file__).parent.parent


def block(document: str, marker: str) -> str:
    """The Python block of `document` that has `marker`."""
    text = (SOURCES / document).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (found,) = [one for one in blocks if marker in one]
    return str(found)


def run(source: str, **names: Any) -> dict[str, Any]:
    """What `source` leaves, with `names` given."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.py"
        path.write_text(source)
        return runpy.run_path(str(path), init_globals=names)


def engine_over(folder: Path) -> TransformersEngine:
    loaded = load_model(folder)
    return TransformersEngine(loaded.model, loaded.tokenizer)


def test_the_ten_lines_learn() -> None:
    ran = run(block("README.md", "es.population()"))
    assert (ran["model"](ran["x"]) - ran["y"]).square().mean().item() < 1.0


def test_scripts_import_esfast_before_torch() -> None:
    """It sets how torch's threads wait, and they read that as torch is loaded."""
    for source in (
        block("README.md", "es.population()"),
        (SOURCES / "examples/own_loop.py").read_text(),
    ):
        nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import)]
        names = [alias.name for node in nodes for alias in node.names]
        assert names.index("esfast") < names.index("torch")


def test_what_is_below_the_loop() -> None:
    names = {"esfast": esfast, "model": torch.nn.Linear(2, 2)}
    names |= {"members": [esfast.Member(seed=7)], "coefficients": [0.1]}
    run(block("README.md", "weights.restore()"), **names)


def test_the_laws_are_the_figures_beside_them() -> None:
    lines = re.findall(r"^(laws\..*)  # ([\d.]+)", block("docs/forgetting.md", "laws."), re.M)
    small = [(call, figure) for call, figure in lines if "places" not in call]
    assert len(small) == 4
    for call, figure in small:
        value = run(f"value = {call}", laws=laws)["value"]
        assert value == pytest.approx(float(figure), rel=0.01)


def test_prior_tasks_from_python(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = block("docs/forgetting.md", "prior.evaluate").replace("size=64", "size=4")
    run(source, engine=engine_over(tiny_model))
    assert re.match(r"questions:capitals \d\.\d+ \[.*\] \d\.\d+ \[.*\]\n$", capsys.readouterr().out)


def test_forgetting_from_python(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "base")
    small = ["--population-size=2", "--prompts=2", "--eval-size=2", "--max-new-tokens=2"]
    small += ["--generations=2", "--threads=1", "--no-plots"]
    assert main(["train", "--model=base", "--output=runs/es", *small]) == 0
    shutil.copytree("runs/es/model", "tuned")
    capsys.readouterr()
    source = block("docs/forgetting.md", "open_subject").replace("smollm2-135m", "base")
    source = source.replace("[10, 20]", "[1, 2]").replace("layers[3]", "layers[0]")
    engines = {"base_engine": engine_over(Path("base")), "tuned_engine": engine_over(Path("tuned"))}
    run(source, prompts=["What is 2 + 2?", "And 3 + 3?"], **engines)
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told[:2]] == ["1", "2"]
    assert re.match(r"KL\(base \|\| tuned\) \S+ \[\S+, \S+\]$", told[-1])
