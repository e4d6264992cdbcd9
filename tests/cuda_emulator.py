"""The CUDA half on the CPU: its own kernels, compiled by the host's compiler.

tests/native/simt/cuda_runtime.h says what is emulated; everything else is the product's code.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("tests/native/cuda_emulator.cpp", "csrc/population.cpp")
# What only nvcc reads, in the words of C++: a launch, and shared memory sized by it.
LAUNCH = re.compile(r"(\w+)<<<(.*?)>>>\(", re.DOTALL)
LENT = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")


def in_plain_words(folder: Path) -> list[Path]:
    """Copies csrc and the emulator into `folder`, CUDA's own syntax replaced: what to compile."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "tests" / "native", folder / "tests" / "native")
    cuda = folder / "csrc" / "cuda"
    for path in [*cuda.glob("*.cu"), *cuda.glob("*.hpp")]:
        text = LAUNCH.sub(r"simt::run(\1, {\2}, ", path.read_text())
        path.write_text(LENT.sub(r"\1* \2 = simt::shared<\1>();", text))
    own = [path for path in cuda.iterdir() if path.suffix in (".cu", ".cpp")]
    return [*own, *(folder / source for source in SOURCES)]


def built(folder: Path) -> Any:
    """The module `cuda_emulator`, compiled into `folder`; skips where there is no compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sys.path.insert(0, str(ROOT))
    try:
        from build_flags import FLAGS
    finally:
        sys.path.remove(str(ROOT))
    pybind11 = pytest.importorskip("pybind11")
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    includes.append(f"-I{folder / 'tests' / 'native' / 'simt'}")
    flags = [flag for flag in FLAGS if flag != "-O3"]
    flags += ["-O1", "-U_FORTIFY_SOURCE", *includes]  # fibers jump between stacks
    jobs, objects = [], []
    for source in in_plain_words(folder):
        objects.append(f"{source}.o")
        command = [compiler, *flags, "-x", "c++", "-c", str(source), "-o", objects[-1]]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, errors[-3000:]
    library = folder / "cuda_emulator.so"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library)], check=True)
    loader = ExtensionFileLoader("cuda_emulator", str(library))
    module = module_from_spec(spec_from_loader("cuda_emulator", loader))
    loader.exec_module(module)
    return module
