"""The core's sources and compiler flags, in one place: the build and the native tests read it.

Each CPU target is one small source compiled with its own instruction-set flags; everything else is
compiled for the architecture's baseline, so that one build runs on every processor of it.
ESFAST_CXXFLAGS adds flags (sanitizers, say). ESFAST_STRICT=1, as CI has it, makes warnings errors:
a compiler that nobody here has seen must not stop a user by one.

CUDA is built where nvcc is found, unless ESFAST_CUDA=0. ESFAST_CUDA_ARCHS="90" names other
architectures than those of sm_80, sm_90 and sm_100 that nvcc knows, with PTX of the last; each
costs about 15 s of one core.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

SOURCES = ["module.cpp", "population.cpp", "segments.cpp", "shaping.cpp"]
SOURCES += ["cpu/parallel.cpp", "cpu/select.cpp", "cpu/scalar.cpp"]
# Exactness: no contraction of a * b + c, no fast-math. The other two only drop side effects
# (errno, exception flags) that would keep sqrt and comparisons from being vectorised.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"]
STRICT = os.environ.get("ESFAST_STRICT", "0") != "0"
FLAGS += ["-Wall", "-Wextra", *(["-Werror"] if STRICT else [])]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni", "-mavx512vpopcntdq"]
AVX512 += ["-mbmi", "-mbmi2"]
TARGETS = {
    "x86_64": {"cpu/avx2.cpp": AVX2, "cpu/avx512.cpp": AVX512},
    "aarch64": {"cpu/neon.cpp": []},
}
TARGETS["AMD64"], TARGETS["arm64"] = TARGETS["x86_64"], TARGETS["aarch64"]


def flags_of(source: str, target_flags: list[str], gcc: bool) -> list[str]:
    # GCC 12's AVX-512 header reads its own "undefined" registers (GCC bug 105593).
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"] if gcc and "avx512" in source else []
    return FLAGS + target_flags + quiet + os.environ.get("ESFAST_CXXFLAGS", "").split()


CUDA_SOURCES = ["cuda/weights.cu", "cuda/lean.cu", "cuda/update.cu", "cuda/shaping.cu"]
CUDA_HOST_SOURCES = ["cuda/bind.cpp", "cuda/plan.cpp"]
CUDA_ARCHS = ("80", "90", "100")
# --fmad=false: no contraction but the bodies' own __fmaf_rn. A spill is an error where warnings
# are: weights in local memory cost more than any occupancy gains.
CUDA_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_FLAGS += ["-Xcompiler", "-Wall,-Wextra,-ffp-contract=off"]
CUDA_STRICT = ["-Xptxas", "-warn-spills,-warn-lmem-usage", "-Werror", "all-warnings"]
CUDA_STRICT += ["-Xcompiler", "-Werror"]


def nvcc() -> str | None:
    """The compiler of the CUDA half, or None where the build goes without."""
    return None if os.environ.get("ESFAST_CUDA") == "0" else shutil.which("nvcc")


def known_archs(compiler: str) -> str:
    """Those of CUDA_ARCHS that this nvcc knows, or its newest: sm_100 came with CUDA 12.8."""
    command = [compiler, "--list-gpu-arch"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    listed = re.findall(r"compute_(\d+)", said)
    known = [arch for arch in CUDA_ARCHS if arch in listed] or listed[-1:] or list(CUDA_ARCHS)
    return " ".join(known) + "+PTX"


def cuda_flags(compiler: str) -> list[str]:
    """nvcc's flags, the architectures among them: "90" gives machine code, "90+PTX" PTX as well."""
    flags = CUDA_FLAGS + (CUDA_STRICT if STRICT else [])
    archs = os.environ.get("ESFAST_CUDA_ARCHS") or known_archs(compiler)
    for arch in archs.replace(";", " ").split():
        number = arch.removesuffix("+PTX")
        codes = f"sm_{number},compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code=[{codes}]")
    return flags


def cuda_library(compiler: str) -> Path:
    """The static runtime, so that one build imports where there is no CUDA, with every torch."""
    command = [compiler, "--dryrun", "-x", "cu", os.devnull]  # it may be a script far from its root
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"TOP=(\S+)", said)
    root = Path(found[1] if found else compiler).resolve()
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        library = root / folder / "libcudart_static.a"
        if library.is_file():
            return library
    raise FileNotFoundError(f"libcudart_static.a is not under {root}; set ESFAST_CUDA=0")
