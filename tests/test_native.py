"""The core without Python: under the sanitizers, by clang++, and on NEON under emulation."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from esfast.members import tensor_id

pytestmark = [pytest.mark.native, pytest.mark.slow]
ROOT = Path(__file__).parents[1]
VECTORS = Path(__file__).parent / "vectors" / "noise_v1.txt"
ROUNDS = 150
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
NEON_TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64")


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The known answers with tensor ids for names: kind seed tensor index element value."""
    lines = []
    for line in VECTORS.read_text().splitlines():
        kind, *fields = line.split()
        if kind in ("gaussian", "rademacher"):
            seed, name, element, value = fields
            lines.append(f"{kind} {seed} {tensor_id(name)} 0 {element} {value}")
        elif kind == "hadamard":
            seed, name, index, element, value = fields
            lines.append(f"{kind} {seed} {tensor_id(name)} {index} {element} {value}")
    path = tmp_path_factory.mktemp("native") / "answers.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def build(folder: Path, compiler: str, machine: str, extra: list[str]) -> Path:
    """Compiles the core's own sources and flags (setup.py's) into the check program."""
    sys.path.insert(0, str(ROOT))
    try:
        from build_flags import SOURCES, TARGETS, flags_of
    finally:
        sys.path.remove(str(ROOT))
    sources = {s: [] for s in SOURCES if s != "module.cpp"} | TARGETS[machine]
    program = folder / "check"
    jobs, objects = [], []
    for source, target_flags in {**sources, "../tests/native/check.cpp": []}.items():
        objects.append(str(folder / (Path(source).name + ".o")))
        flags = [*flags_of(source, target_flags, "clang" not in compiler), "-Werror"]
        command = [compiler, *flags, *extra, "-c", str(ROOT / "csrc" / source), "-o", objects[-1]]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, errors[-3000:]
    subprocess.run([compiler, *extra, "-pthread", *objects, "-o", str(program)], check=True)
    return program


def digests(command: list[str], answers: Path) -> dict[str, str]:
    run = subprocess.run(
        [*command, str(answers), str(ROUNDS)], capture_output=True, text=True, timeout=1800
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return dict(line.split() for line in run.stdout.splitlines())


@pytest.fixture(scope="session")
def native_digest(tmp_path_factory: pytest.TempPathFactory, answers: Path) -> str:
    """Digest of the random rounds under the sanitizers, the same on each target."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitized")
    found = digests([str(build(folder, compiler, platform.machine(), SANITIZERS))], answers)
    assert len(set(found.values())) == 1, found
    return next(iter(found.values()))


def test_every_target_is_clean_under_the_sanitizers_and_agrees(native_digest: str) -> None:
    assert len(native_digest) == 16


def test_clang_gives_the_same_bits(tmp_path: Path, answers: Path, native_digest: str) -> None:
    names = ["clang++", *(f"clang++-{version}" for version in range(25, 11, -1))]
    compiler = next(filter(shutil.which, names), None)
    if compiler is None:
        pytest.skip("clang++ is not installed")
    found = digests([str(build(tmp_path, compiler, platform.machine(), ["-O2"]))], answers)
    assert set(found.values()) == {native_digest}


def test_neon_gives_the_same_bits_under_emulation(
    tmp_path: Path, answers: Path, native_digest: str
) -> None:
    missing = [tool for tool in NEON_TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    program = build(tmp_path, NEON_TOOLS[0], "aarch64", ["-O2", "-static"])
    found = digests([NEON_TOOLS[1], str(program)], answers)
    assert "neon" in found
    assert set(found.values()) == {native_digest}
