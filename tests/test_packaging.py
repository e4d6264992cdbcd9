"""What is packed: an sdist from which the core can be built."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ("setup.py", "build_flags.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def test_an_sdist_holds_what_builds_the_core(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    project = tmp_path / "a b"
    shutil.copytree(ROOT / "csrc", project / "csrc")
    shutil.copytree(ROOT / "esfast", project / "esfast", ignore=shutil.ignore_patterns("*.so"))
    for name in NEEDED:
        shutil.copy(ROOT / name, project / name)
    command = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (archive,) = (project / "dist").iterdir()
    with tarfile.open(archive) as file:
        packed = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    data = {str(p.relative_to(ROOT)) for p in (ROOT / "esfast" / "tasks").rglob("*.jsonl")}
    assert len(sources) > 40 and data
    assert packed >= sources | data | {*NEEDED}
