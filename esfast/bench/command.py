"""`esfast bench`: flags in, tables and files out.

    esfast bench                                          a minute or two on two cores
    esfast bench --dtype float32 --only 'update-gaussian' --rounds 9 --csv mine.csv
    esfast bench --parameters 1B --noise hadamard --plot roofline.png

What can be refused is refused before anything is measured. Rows are written to --csv after each
dtype and number of threads, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from esfast import _core
from esfast.bench.measure import measure, variants
from esfast.bench.roofline import draw_roofline
from esfast.bench.rows import Row, Stamp, merge_csv, read_csv, record, rows_of
from esfast.bench.show import console, quiet_note, show
from esfast.bench.traffic import base_bytes
from esfast.bench.workload import (
    CHECKSUM,
    CYCLE,
    DTYPES,
    LARGEST_BUFFER,
    UPDATE,
    Bench,
    Case,
    Shapes,
    count,
    shapes_of_count,
    shapes_of_model,
)
from esfast.errors import ConfigError, first_line
from esfast.members import NOISES
from esfast.models import DEFAULT_MODEL
from esfast.provenance import commit, device_name, one_line, provenance
from esfast.resources import require_memory, usable_cores
from esfast.train_flags import positive, thread_count
from esfast.weights import MEMORIES
from esfast.whole_file import write_whole

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
BESIDE_TABLE = 200_000_000  # bytes: torch's temporaries, the peers' part, the cached tables
CPU = "cpu"


@dataclass(frozen=True)
class Plan:
    """What is measured. runs: (dtype, threads, cases), in order."""

    shapes: Shapes
    table: str
    device: str
    rounds: int
    runs: tuple[tuple[str, int, tuple[Case, ...]], ...]


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `esfast bench`."""
    what = parser.add_argument_group("what is measured")
    for name, choices, default, about in (
        ("dtype", tuple(DTYPES), ["bfloat16"], "of the weights"),
        ("noise", NOISES, list(NOISES), "docs/noise.md"),
        ("memory", MEMORIES, ["lean", "shadow"], "of esfast.Weights"),
    ):
        what.add_argument(f"--{name}", nargs="+", choices=choices, default=default, help=about)
    what.add_argument(
        "--population", nargs="+", type=positive, default=[8, 30, 128],
        help="of updates; 30 is 32 for Hadamard, a whole group",
    )  # fmt: skip
    what.add_argument("--only", default="", metavar="REGEX", help="cases whose name has a match")
    table = parser.add_argument_group("the weights").add_mutually_exclusive_group()
    table.add_argument("--model", default=DEFAULT_MODEL, help="its shapes; no weights are read")
    table.add_argument(
        "--parameters", type=_count, default=None, metavar="N", help="or so many, such as 1B"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--device", default=CPU, help="cpu, or cuda")
    cores = [usable_cores()]
    where.add_argument(
        "--threads", nargs="+", type=thread_count, default=cores, help="one run each"
    )
    where.add_argument(
        "--targets", nargs="+", choices=_core.targets(), default=[_core.target()],
        help="instruction sets",
    )  # fmt: skip
    out = parser.add_argument_group("how often, and where to")
    out.add_argument("--rounds", type=positive, default=5, help="measured; one more before")
    out.add_argument("--json", type=Path, default=None, metavar="FILE", help="all rows; replaced")
    out.add_argument("--csv", type=Path, default=None, metavar="FILE", help="merged row by row")
    out.add_argument("--plot", type=Path, default=None, metavar="FILE", help="roofline PNG")


def run_bench(args: argparse.Namespace) -> int:
    """Measures, prints and writes; returns the exit code."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    _require_outputs(args)
    plan = _plan(args)
    out = console()
    made = {
        **provenance(args.command_line),
        "device": device_name(plan.device),
        "load_average": load,
    }
    out.print(f"{made['device']}, {one_line(made)}", style="dim", highlight=False, soft_wrap=True)
    note = quiet_note(load, usable_cores()) if plan.device == CPU else None
    if note:
        out.print(note, style="yellow", highlight=False, soft_wrap=True)
    rows = _measured(plan, load, out, args.csv)
    if args.json is not None:
        write_whole(args.json, json.dumps(record(made, rows), indent=1).encode() + b"\n")
    if args.plot is not None:
        draw_roofline(args.plot, rows, one_line(made))
    return 0


# ---- what to measure ---------------------------------------------------------------------------


def _plan(args: argparse.Namespace) -> Plan:
    device = _device(args.device)
    runs = []
    for dtype in dict.fromkeys(args.dtype):
        cases = tuple(case for case in _cases(args, dtype, device) if _matches(args.only, case))
        threads = args.threads if device == CPU else [1]
        runs += [(dtype, number, cases) for number in dict.fromkeys(threads) if cases]
    if not runs:
        known = ", ".join(map(str, _cases(args, args.dtype[0], device)[:3]))
        raise ConfigError(f"no case's name matches --only {args.only!r}; names are {known}, ...")
    if args.plot is not None and all(c.noise == "none" for run in runs for c in run[2]):
        raise ConfigError("--plot shows noise, and --only leaves no case with any; leave it out.")
    if args.parameters is None:
        shapes, table = shapes_of_model(args.model), args.model
    else:
        shapes, table = shapes_of_count(args.parameters), f"{args.parameters} parameters"
    plan = Plan(shapes, table, device, args.rounds, tuple(runs))
    _require_room(plan)
    return plan


def _cases(args: argparse.Namespace, dtype: str, device: str) -> list[Case]:
    """Every case of one dtype that the flags leave."""
    targets = dict.fromkeys(args.targets) if device == CPU else ["cuda"]
    out = []
    for target in targets:
        for noise in dict.fromkeys(args.noise):
            for memory in dict.fromkeys(args.memory):
                if memory == "master" and dtype == "float32":
                    continue  # the same as shadow
                out.append(Case(CYCLE, noise, dtype, memory, 1, target, device))
                out += [
                    Case(UPDATE, noise, dtype, memory, members, target, device)
                    for members in _populations(args.population, noise)
                ]
        out.append(Case(CHECKSUM, "none", dtype, "lean", 1, target, device))
    return out


def _populations(given: Sequence[int], noise: str) -> list[int]:
    whole = [32 if (n, noise) == (30, "hadamard") else n for n in given]
    return list(dict.fromkeys(whole))


def _matches(only: str, case: Case) -> bool:
    try:
        return re.search(only, str(case)) is not None
    except re.error as error:
        raise ConfigError(f"--only {only!r} is no regular expression: {error}.") from None


def _device(name: str) -> str:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name!r} cannot be used: {first_line(error)}. Give cpu, or cuda "
            f"where `esfast info` shows a device."
        ) from None
    if device.type not in (CPU, "cuda"):
        raise ConfigError(f"--device {name!r} is neither a CPU nor a CUDA device.")
    if device.type == CPU:
        return CPU
    if device.index is not None:  # "cuda" is the current one, and no argument of set_device
        torch.cuda.set_device(device)  # events are recorded on its stream
    return str(device)


def _require_outputs(args: argparse.Namespace) -> None:
    for flag, path in (("json", args.json), ("csv", args.csv), ("plot", args.plot)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"--{flag} {path} is no file in a folder that is there.")
    if args.csv is not None:
        read_csv(args.csv)  # refused now rather than after the measurement
    if args.plot is not None and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; pip install matplotlib, or leave --plot out.")


def _require_room(plan: Plan) -> None:
    """The largest dtype's weights, their bases and two buffers."""
    if plan.device != CPU:
        return  # torch says what is missing
    parameters = count(plan.shapes)
    needed = 0
    for name, _, cases in plan.runs:
        dtype = DTYPES[name]
        live = parameters * dtype.itemsize
        bases = sum(base_bytes(memory, dtype) for memory in {case.memory for case in cases})
        buffers = 2 * min(live, LARGEST_BUFFER)
        needed = max(needed, live + parameters * bases + buffers + live // 4)
    mend = "Give fewer --parameters, or --memory lean alone."
    require_memory(needed + BESIDE_TABLE, f"measuring {parameters:,} parameters", mend)


# ---- measuring ---------------------------------------------------------------------------------


def _measured(plan: Plan, load: float | None, out: Console, csv: Path | None) -> list[Row]:
    rows: list[Row] = []
    bench: Bench | None = None
    before = torch.get_num_threads()
    try:
        for dtype, threads, cases in plan.runs:
            if bench is None or bench.dtype != dtype:
                bench = None  # its weights go before the next ones come
                bench = Bench(plan.shapes, dtype, threads, plan.device)
            bench.rethread(threads)
            fresh = _run(bench, cases, plan, _stamp(plan, load, threads), out)
            show(out, fresh)
            rows += fresh
            if csv is not None:
                merge_csv(csv, fresh)
    finally:
        torch.set_num_threads(before)
    return rows


def _run(bench: Bench, cases: Sequence[Case], plan: Plan, stamp: Stamp, out: Console) -> list[Row]:
    chosen = variants(bench, cases)
    columns = (TextColumn("{task.description:44.44}"), BarColumn(bar_width=None),
               TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task("", total=(plan.rounds + 1) * len(chosen))

        def advance(name: str) -> None:
            progress.update(task, advance=1, description=name)

        return rows_of(measure(chosen, plan.rounds, advance), stamp)


def _stamp(plan: Plan, load: float | None, threads: int) -> Stamp:
    return Stamp(
        commit=commit() or "unknown",
        date=datetime.now(timezone.utc).date().isoformat(),
        device=device_name(plan.device),
        load=None if load is None else round(load, 2),
        threads=threads,
        table=plan.table,
    )


# ---- flags -------------------------------------------------------------------------------------


def _count(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.upper())
    value = round(float(found[1]) * UNITS[found[2]]) if found else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 1000000, 135M or 8B")
    return value
