"""`esfast bench`: what the kernels take on this machine, beside what limits them and torch's loops.

    workload.py  the tables, the cases, and how a case is run
    peers.py     the published torch loops, and plain passes over memory
    traffic.py   bytes moved and values drawn a parameter
    measure.py   interleaved rounds, medians
    rows.py      rows with shares of the limits and ratios to the peers; CSV and JSON
    show.py      the table on the terminal
    roofline.py  the plot
    command.py   flags

docs/benchmarks.md says how to read the result. A timing is never a test.
"""

from esfast.bench.command import add_bench_arguments, run_bench

__all__ = ["add_bench_arguments", "run_bench"]
