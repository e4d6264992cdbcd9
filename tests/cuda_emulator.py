"""The CUDA half on the CPU: its own kernels, compiled by the host's compiler.

tests/native/simt/cuda_runtime.h says what is emulated; everything else is the product's code.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Build:
    """The module `cuda_emulator` in the making: compilers run until `module` waits for them."""

    output: Path
    compiler: str
    jobs: Mapping[str, subprocess.Popen[str]]  # by object file

    def module(self) -> Any:
        for job in self.jobs.values():
            _, errors = job.communicate()
            assert job.returncode == 0, errors[-3000:]
        link = [self.compiler, "-shared", *self.jobs, "-o", str(self.output)]
        subprocess.run(link, check=True)
        loader = ExtensionFileLoader("cuda_emulator", str(self.output))
        module = module_from_spec(spec_from_loader("cuda_emulator", loader))
        loader.exec_module(module)
        return module


def begun(folder: Path) -> Build | None:
    """Starts to compile into `folder`, and lets others go first; None without a compiler."""
    compiler, pybind11 = shutil.which("c++"), find_spec("pybind11")
    if compiler is None or pybind11 is None:
        return None
    sys.path.insert(0, str(ROOT))
    try:
        from build_flags import FLAGS
    finally:
        sys.path.remove(str(ROOT))
    headers = Path(str(pybind11.origin)).parent / "include"
    includes = [headers, sysconfig.get_path("include"), folder / "tests" / "native" / "simt"]
    flags = [flag for flag in FLAGS if flag != "-O3"]
    flags += ["-O1", "-U_FORTIFY_SOURCE"]  # fibers jump between stacks
    flags += [f"-I{include}" for include in includes]
    jobs = {}
    for source in in_plain_words(folder):
        command = ["nice", compiler, *flags, "-x", "c++", "-c", str(source), "-o", f"{source}.o"]
        jobs[command[-1]] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    return Build(folder / "cuda_emulator.so", compiler, jobs)
