"""Builds esfast._core through ninja. `CXX` names the compiler; flags are in build_flags.py."""

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
sys.path.insert(0, str(ROOT))  # build isolation does not put the project's folder there

from build_flags import SOURCES, TARGETS, flags_of  # noqa: E402


def is_gcc(compiler: str) -> bool:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return "clang" not in version.stdout.lower()


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
