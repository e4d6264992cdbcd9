"""What nvcc made of the kernels: no spills, no stack frames, no multiply-add beyond the bodies'.

Read from the built module by cuobjdump (of the CUDA toolkit, or the one inside triton's wheel).
A multiply-add that was not written is another rounding: it would change bits.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from esfast import _core

# Per element: a Gaussian pair has 18 (1 + 7 + 1 for the logarithm, 2 for the root, 3 and 4 for sine
# and cosine); perturb 1 a pair of dtypes (5 with masters, 3 in lean memory, twice where the loss is
# looked for); l2 decay 1 a pair of dtypes; an update adds 1 a member; a Hadamard member's value is
# 1, exact before it rounds. A thread has 16 elements. All of it once for tiles that lie anyhow, and
# for dense ones, of one pair of dtypes, a second time.
GAUSSIAN, ONE = 8 * 18, 16
HADAMARD = ONE
FUSED = {
    ("perturb_kernel", "gaussian"): 2 * GAUSSIAN + 6 * ONE,
    ("perturb_kernel", "rademacher"): 6 * ONE,
    ("perturb_kernel", "hadamard"): 2 * HADAMARD + 6 * ONE,
    ("record_kernel", "gaussian"): 2 * GAUSSIAN + 4 * 2 * ONE,
    ("record_kernel", "rademacher"): 4 * 2 * ONE,
    ("record_kernel", "hadamard"): 2 * HADAMARD + 4 * 2 * ONE,
    ("restore_kernel", "gaussian"): 2 * GAUSSIAN + 4 * ONE,
    ("restore_kernel", "rademacher"): 4 * ONE,
    ("restore_kernel", "hadamard"): 2 * HADAMARD + 4 * ONE,
    ("update_kernel", "gaussian"): 2 * (GAUSSIAN + ONE) + 6 * ONE,
    ("update_kernel", "rademacher"): 6 * ONE,
    ("hadamard_kernel", ""): 6 * ONE,
    ("hadamard_global_kernel", ""): 6 * ONE,
    ("refresh_kernel", ""): 0,
    ("capture_kernel", ""): 0,
    ("checksum_kernel", ""): 0,
}
NOISES = {"0": "gaussian", "1": "rademacher", "2": "hadamard"}


def cuobjdump() -> str:
    """The tool's path; skips where there is none, or no kernels to read."""
    if "cuda" not in vars(_core):
        pytest.skip("this build has no CUDA kernels")
    found = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(inside) if inside.is_file() else None
    if found is None:
        pytest.skip("no cuobjdump (CUDA toolkit, or the triton package)")
    return found


def dump(what: str) -> str:
    command = [cuobjdump(), what, str(_core.__file__)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernel_of(mangled: str) -> tuple[str, str]:
    name = re.search(r"\d+([a-z_]+_kernel)", mangled)
    assert name, mangled
    noise = re.search(r"NoiseE(\d)", mangled)
    return name[1], NOISES[noise[1]] if noise else ""


def fused() -> Iterator[tuple[str, tuple[str, str], Counter[str]]]:
    """Architecture, kernel, and how often each fp32 multiply-add instruction occurs."""
    for part in re.split(r"(?=arch = sm_)", dump("-sass"))[1:]:
        arch = part.split()[2]
        for function in part.split("Function : ")[1:]:
            mnemonics = re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", function)
            counts = Counter(m for m in mnemonics if m in ("FFMA", "FFMA2", "FFMA32I"))
            yield arch, kernel_of(function.split()[0]), counts


def test_no_spills_and_no_stack_frames() -> None:
    usage = dump("-res-usage")
    kernels = re.findall(r"Function (\S+):\s*\n?\s*REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert len(kernels) >= len(FUSED)
    for name, registers, stack, local in kernels:
        assert (int(stack), int(local)) == (0, 0), name
        # 16 warps a multiprocessor; 12 for the rare kernel whose tables lie in global memory
        assert int(registers) <= (168 if "hadamard_global" in name else 128), name


def test_no_multiply_add_beyond_the_written_ones() -> None:
    seen = set()
    for arch, kernel, counts in fused():
        if kernel not in FUSED:
            continue
        seen.add(kernel)
        pairs = 2 * counts["FFMA2"] + counts["FFMA"] + counts["FFMA32I"]
        written = FUSED[kernel]  # branches that end alike may share those of one dtype
        assert written - ONE <= pairs <= written, (arch, kernel, counts)
    assert seen == set(FUSED)
