"""Builds esfast._core through ninja. `CXX` names the compiler, with a launcher (ccache) or flags of
its own if need be; flags are in build_flags.py."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # build isolation does not put the project's folder there

from build_flags import (  # noqa: E402
    CUDA_HOST_SOURCES,
    CUDA_SOURCES,
    SOURCES,
    TARGETS,
    cuda_flags,
    cuda_library,
    flags_of,
    nvcc,
)


@dataclass(frozen=True)
class Step:
    """One command of the build: $out and $in stand for `output` and `inputs`."""

    output: str
    inputs: tuple[str, ...]
    command: str

    @property
    def shell(self) -> str:
        joined = " ".join(map(shlex.quote, self.inputs))
        return self.command.replace("$out", shlex.quote(self.output)).replace("$in", joined)


def the_compiler() -> str:
    return os.environ.get("CXX") or "c++"


def is_gcc(compiler: str) -> bool:
    command = [*shlex.split(compiler), "--version"]
    try:
        version = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"esfast: the C++ compiler '{compiler}' does not run ({error}). Install one that knows "
            "C++17 (Debian, Ubuntu: apt install g++), or name one: CXX=clang++ pip install ..."
        ) from None
    return "clang" not in version.stdout.lower()


def ninja_path(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


def pybind_include() -> str:
    """pybind11's headers: its own package's, else the copy that torch carries."""
    try:
        import pybind11

        return pybind11.get_include()
    except ImportError:
        torch = find_spec("torch")
        if torch is None or torch.origin is None:
            raise
        return str(Path(torch.origin).parent / "include")


def compile_steps() -> list[Step]:
    compiler = the_compiler()
    gcc = is_gcc(compiler)
    folders = (pybind_include(), sysconfig.get_path("include"))
    includes = [f"-isystem {shlex.quote(folder)}" for folder in folders]
    sources = {source: [] for source in SOURCES} | TARGETS.get(platform.machine(), {})
    cuda = nvcc()
    if cuda:
        sources |= {source: [] for source in CUDA_HOST_SOURCES}
        sources["module.cpp"] = ["-DESFAST_CUDA"]
    steps = []
    for source, extra in sources.items():
        flags = " ".join([*flags_of(source, extra, gcc), *includes])
        steps.append((source, f"{compiler} -MMD -MF $out.d {flags} -c $in -o $out"))
    for source in CUDA_SOURCES if cuda else ():
        flags = " ".join(cuda_flags(cuda))
        steps.append((source, f"{shlex.quote(cuda)} -MD -MF $out.d {flags} -c $in -o $out"))
    return [
        Step(source.replace("/", "_") + ".o", (str(ROOT / "csrc" / source),), command)
        for source, command in steps
    ]


def link_step(output: Path, objects: list[str]) -> Step:
    compiler = the_compiler()
    shared = "-shared" if platform.system() == "Linux" else "-bundle -undefined dynamic_lookup"
    flags = ["-pthread", os.environ.get("ESFAST_CXXFLAGS", "")]
    inputs, cuda = list(objects), nvcc()
    if cuda:
        inputs.append(str(cuda_library(cuda)))
        # torch brings a CUDA runtime of its own; neither may answer the other's calls.
        flags += ["-Wl,--exclude-libs,ALL", "-ldl", "-lrt"]
    return Step(str(output), tuple(inputs), f"{compiler} {shared} $in {' '.join(flags)} -o $out")


class NinjaBuild(build_ext):
    """Writes build.ninja and runs ninja: parallel, and only what changed; plainly without ninja."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        steps = compile_steps()
        link = link_step(output, [step.output for step in steps])
        if shutil.which("ninja") or find_spec("ninja"):
            self.run_ninja(folder, [*steps, link])
        else:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda step: self.run_step(folder, step), steps))
            self.run_step(folder, link)
        found = "with CUDA kernels" if nvcc() else "no nvcc (or ESFAST_CUDA=0): built for the CPU"
        print(f"esfast: {found}")

    def run_step(self, folder: Path, step: Step) -> None:
        subprocess.run(step.shell, shell=True, check=True, cwd=folder)

    def run_ninja(self, folder: Path, steps: list[Step]) -> None:
        lines = []
        for number, step in enumerate(steps):
            depfile = "\n  depfile = $out.d\n  deps = gcc" if "$out.d" in step.command else ""
            says = f"\n  description = {Path(step.output).name}"
            lines.append(f"rule r{number}\n  command = {step.command}{says}{depfile}")
            inputs = " ".join(map(ninja_path, step.inputs))
            lines.append(f"build {ninja_path(step.output)}: r{number} {inputs}")
        lines.append(f"default {ninja_path(steps[-1].output)}\n")
        (folder / "build.ninja").write_text("\n".join(lines), encoding="utf-8")
        found = shutil.which("ninja")
        ninja = [found] if found else [sys.executable, "-m", "ninja"]
        subprocess.run([*ninja, "-C", str(folder)], check=True)


setup(ext_modules=[Extension("esfast._core", [])], cmdclass={"build_ext": NinjaBuild})
