"""The CUDA half on the CPU: its own device functions, compiled by the host's compiler.

tests/native/cuda_emulator.cpp says what is emulated and what is the product's code.
"""

from __future__ import annotations

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
SOURCES = ("tests/native/cuda_emulator.cpp", "csrc/cuda/bind.cpp", "csrc/cuda/plan.cpp")
SOURCES += ("csrc/population.cpp",)


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
    jobs, objects = [], []
    for source in SOURCES:
        objects.append(str(folder / (Path(source).name + ".o")))
        flags = [flag for flag in FLAGS if flag != "-O3"] + ["-O1", *includes]
        command = [compiler, *flags, "-c", str(ROOT / source), "-o", objects[-1]]
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
