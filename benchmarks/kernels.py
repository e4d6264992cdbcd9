#!/usr/bin/env python
"""`esfast bench` with the settings whose rows are committed: benchmarks/results/kernels_cpu.csv.

    python benchmarks/kernels.py --plot benchmarks/results/roofline_cpu.png
    python benchmarks/kernels.py --dtype bfloat16 --memory lean shadow --targets avx2

Every flag of `esfast bench` may follow, and takes the place of these settings. Rows that a narrower
call does not touch stay in the file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from esfast import cli

# Relative, since the plot and the CSV say how they were made.
RESULTS = Path(os.path.relpath(Path(__file__).parent / "results"))
DTYPES = ["bfloat16", "float16", "float32"]
SETTINGS = [
    "--dtype", *DTYPES, "--memory", "lean", "shadow", "master",
    "--csv", str(RESULTS / "kernels_cpu.csv"),
]  # fmt: skip

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    sys.exit(cli.main(["bench", *SETTINGS, *sys.argv[1:]]))
