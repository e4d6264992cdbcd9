"""Builds esfast._core: one list of sources and flags, compiled by ninja.

Each CPU target is one small source compiled with its own instruction-set flags; everything else is
compiled for the architecture's baseline, so that one build runs on every processor of it.
`CXX` names the compiler; `ESFAST_CXXFLAGS` adds flags (sanitizers, say).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ["module.cpp", "population.cpp", "segments.cpp", "shaping.cpp"]
SOURCES += ["cpu/parallel.cpp", "cpu/select.cpp", "cpu/scalar.cpp"]
# Exactness: no contraction of a * b + c, no fast-math. The other two only drop side effects
# (errno, exception flags) that would keep sqrt and comparisons from being vectorised.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"]
FLAGS += ["-Wall", "-Wextra", "-Werror"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-mavx512vbmi2", "-mavx512vpopcntdq", "-mpopcnt", "-mbmi", "-mbmi2"]
TARGETS = {
    "x86_64": {"cpu/avx2.cpp": AVX2, "cpu/avx512.cpp": AVX512},
    "aarch64": {"cpu/neon.cpp": []},
}
TARGETS["AMD64"], TARGETS["arm64"] = TARGETS["x86_64"], TARGETS["aarch64"]


def is_gcc(compiler: str) -> bool:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return "clang" not in version.stdout.lower()


def flags_of(source: str, target_flags: list[str], gcc: bool) -> list[str]:
    # GCC 12's AVX-512 header reads its own "undefined" registers (GCC bug 105593).
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"] if gcc and "avx512" in source else []
    return FLAGS + target_flags + quiet + os.environ.get("ESFAST_CXXFLAGS", "").split()


class NinjaBuild(build_ext):
    """Writes build.ninja and runs ninja: parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.rules(output))
        ninja = (
            [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        )
        subprocess.run([*ninja, "-C", str(folder)], check=True)
        if shutil.which("nvcc"):
            print("esfast: nvcc found, but this version has no CUDA sources: built for the CPU")
        else:
            print("esfast: no nvcc: built for the CPU")

    def rules(self, output: Path) -> str:
        compiler = os.environ.get("CXX", "c++").split()[0]
        gcc = is_gcc(compiler)
        include = [pybind11.get_include(), sysconfig.get_path("include")]
        includes = " ".join(f"-isystem {path}" for path in include)
        shared = "-shared" if platform.system() == "Linux" else "-bundle -undefined dynamic_lookup"
        lines = [
            "rule cxx\n  description = compile $in\n  depfile = $out.d\n  deps = gcc",
            f"  command = {compiler} -MMD -MF $out.d $flags {includes} -c $in -o $out",
            "rule link\n  description = link $out",
            f"  command = {compiler} {shared} -pthread $flags $in -o $out",
        ]
        objects = []
        sources = {source: [] for source in SOURCES} | TARGETS.get(platform.machine(), {})
        for source, extra in sources.items():
            objects.append(source.replace("/", "_") + ".o")
            flags = " ".join(flags_of(source, extra, gcc))
            lines.append(f"build {objects[-1]}: cxx {ROOT / 'csrc' / source}\n  flags = {flags}")
        link_flags = os.environ.get("ESFAST_CXXFLAGS", "")
        lines.append(f"build {output}: link {' '.join(objects)}\n  flags = {link_flags}")
        return "\n".join(lines) + f"\ndefault {output}\n"


setup(ext_modules=[Extension("esfast._core", [])], cmdclass={"build_ext": NinjaBuild})
