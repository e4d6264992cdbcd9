"""The core's sources and compiler flags, in one place: the build and the native tests read it.

Each CPU target is one small source compiled with its own instruction-set flags; everything else is
compiled for the architecture's baseline, so that one build runs on every processor of it.
`ESFAST_CXXFLAGS` adds flags (sanitizers, say).
"""

from __future__ import annotations

import os

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


def flags_of(source: str, target_flags: list[str], gcc: bool) -> list[str]:
    # GCC 12's AVX-512 header reads its own "undefined" registers (GCC bug 105593).
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"] if gcc and "avx512" in source else []
    return FLAGS + target_flags + quiet + os.environ.get("ESFAST_CXXFLAGS", "").split()
