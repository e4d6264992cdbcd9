#!/usr/bin/env python
"""The laws of drift, measured on real weights' elements under rewards that are pure noise.

    python benchmarks/forgetting/laws.py [--model smollm2-135m] [--every 128] [--threads N]

Takes every 128th element of every tensor of the model (so that magnitudes, and with them the last
places of bf16, are a real model's), moves them by generations of random rewards at the paper's
settings (arXiv 2605.30148: alpha 5e-4, lambda 10, population 30; five time constants), and compares
the norm of the change with esfast.forgetting.laws. Beside it the decay as bf16 torch loops have it:
the step rounded to nearest, then delta = w - anchor; w -= alpha * lambda * delta, each operation
rounded to bf16. l1 decay at the paper's lambda 0.01 and at five times that, and at rest over a
range of pulls, with the share of weights that it leaves where they were. Writes
benchmarks/results/forgetting_laws_cpu.csv and .png. No model is run, and no time is measured. Some
minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from laws_figures import (
    ALPHA,
    GENERATIONS,
    L1_LAMBDA,
    LAMBDA,
    MEMBERS,
    ONE_SCALE,
    PART,
    RATIOS,
    Row,
    draw,
)
from rich.progress import track

from esfast import Anchor, AnchoredDecay, EvolutionStrategy, ParameterTable, Weights
from esfast.forgetting import laws
from esfast.models import load_model
from esfast.provenance import commit, device_name, one_line, provenance
from esfast.resources import usable_cores

RESULTS = Path(__file__).parent.parent / "results" / "forgetting_laws_cpu"
POINTS = (1, 2, 4, 8, 16, 32, 64, 125, 250, 500, 750, 1000)
POPULATIONS = (4, 8, 16, 32, 64, 128, 256)
SCALES = tuple(2.0**e for e in range(-11, 8))
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A run of noise: what kind of weights, and the strategy's settings."""

    title: str
    dtype: torch.dtype = torch.float32
    memory: str = "lean"
    weight: float = LAMBDA
    alpha: float = ALPHA
    members: int = MEMBERS
    kind: str = "l2"
    three_operations: bool = False  # the torch loops' decay, after a step rounded to nearest
    seed: int = 0


def sampled(model: str, every: int) -> Tensors:
    """Every so-many-th element of each tensor (at least one), fp64."""
    parameters = load_model(model, dtype=torch.bfloat16).model.named_parameters()
    return {name: p.detach().flatten()[::every].double() for name, p in parameters}


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double() for tensor in tensors.values()])


def three_operations(tensors: Tensors, anchor: Tensors, strength: float) -> None:
    """Anchored decay of a torch loop: each line's result is rounded to the weights' dtype."""
    for name, tensor in tensors.items():
        delta = tensor - anchor[name]
        tensor -= strength * delta


def strategy(case: Case, live: Tensors, threads: int | None) -> EvolutionStrategy:
    ours = case.weight and not case.three_operations
    return EvolutionStrategy(
        ParameterTable.from_tensors(live),
        memory=case.memory,
        threads=threads,
        alpha=case.alpha,
        population_size=case.members,
        seed=case.seed,
        decay=AnchoredDecay(case.kind, case.weight) if ours else None,
        rounding="nearest" if case.three_operations else "stochastic",
    )


def walk(
    case: Case, base: Tensors, points: tuple[int, ...], threads: int | None
) -> Iterator[tuple[int, Tensors, torch.Tensor]]:
    """At each of `points`: (generation, live weights, change of what updates start from)."""
    anchor = {name: tensor.to(case.dtype) for name, tensor in base.items()}
    live = {name: tensor.clone() for name, tensor in anchor.items()}
    es, start = strategy(case, live, threads), flat(anchor)
    rng = np.random.default_rng(case.seed)
    for generation in track(range(1, points[-1] + 1), case.title):
        es.step(rng.normal(size=case.members))
        if case.three_operations:
            three_operations(live, anchor, case.alpha * case.weight)
        if generation in points:
            state = torch.cat([t.detach().double().flatten() for t in es.weights.state()])
            yield generation, live, state - start


def law_of(case: Case, base: Tensors, generation: int) -> float:
    """What the change's norm should be: for the torch loops, what decay would make of it."""
    if case.dtype is torch.float32 or case.memory == "master" or case.three_operations:
        count = sum(t.numel() for t in base.values())
        law = laws.l1_norm if case.kind == "l1" else laws.l2_norm
        return law(case.alpha, case.weight, case.members, count, generation)
    places = laws.last_places(tensor.to(case.dtype) for tensor in base.values())
    return laws.stochastic_rounding_norm(
        case.alpha, case.members, places, case.weight, generation, case.kind
    )


def row_of(case: Case, what: str, generation: int, law: float, measured: float) -> Row:
    return {
        "case": case.title,
        "quantity": what,
        "dtype": str(case.dtype).removeprefix("torch."),
        "memory": case.memory,
        "alpha": case.alpha,
        "lambda": case.weight,
        "kind": case.kind if case.weight else "",
        "population": case.members,
        "generations": generation,
        "law": float(f"{law:.6g}"),
        "measured": float(f"{measured:.6g}"),
        "measured_over_law": round(measured / law, 4),
    }


def norms(
    case: Case, base: Tensors, threads: int | None, points: tuple[int, ...] = POINTS
) -> list[Row]:
    return [
        row_of(case, "norm", at, law_of(case, base, at), float(change.norm()))
        for at, _, change in walk(case, base, points, threads)
    ]


def decay_alone(case: Case, base: Tensors, threads: int | None) -> list[Row]:
    """What is left, along itself, of the change of a walk to the plateau's size, under no step."""
    anchor = {name: tensor.to(case.dtype) for name, tensor in base.items()}
    reach = round(laws.time_constant(case.alpha, case.weight) / 2)
    free = replace(case, weight=0.0, three_operations=False)
    *_, (_, live, start) = walk(free, base, (reach,), threads)
    weights = Weights(
        ParameterTable.from_tensors(live),
        anchor=Anchor.in_memory(ParameterTable.from_tensors(anchor)),
        threads=threads,
    )
    decay = AnchoredDecay("l2", case.weight)
    rows = []
    for generation in track(range(1, 401), case.title):
        if case.three_operations:
            three_operations(live, anchor, case.alpha * case.weight)
        else:
            weights.update([], [], decay=decay, alpha=case.alpha, seed=generation)
        if generation % 25 == 0:
            left = float((flat(live) - flat(anchor)) @ start / start.square().sum())
            law = laws.kept(case.alpha, case.weight) ** generation
            rows.append(row_of(case, "left of a change", generation, law, left))
    return rows


def at_scale(scale: float, weight: float, threads: int | None) -> Row:
    """Normals of spread `scale` in bf16: from last places far below a step to far above it."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(ONE_SCALE, generator=generator, dtype=torch.float64) * scale}
    title = f"bf16 normals, spread {scale:g}"
    case = Case(title, torch.bfloat16, weight=weight)
    generations = GENERATIONS if weight else 100
    return {"scale": scale, **norms(case, base, threads, (generations,))[0]}


def l1_at_rest(ratio: float, part: Tensors, threads: int | None) -> list[Row]:
    """Norm and share of unchanged weights after four time constants, 30 generations at least."""
    case = Case(f"fp32, l1, {ratio:g} of a step", weight=ratio / math.sqrt(MEMBERS), kind="l1",
                seed=int(100 * ratio))  # fmt: skip
    generations = max(30, round(4 * laws.l1_time_constant(case.weight, case.members)))
    *_, (_, _, change) = walk(case, part, (generations,), threads)
    seen = {"norm": float(change.norm()), "unchanged": float((change == 0).double().mean())}
    law = {
        "norm": laws.l1_norm(case.alpha, case.weight, case.members, change.numel()),
        "unchanged": laws.l1_unchanged_share(case.weight, case.members),
    }
    return [row_of(case, what, generations, law[what], seen[what]) for what in law]


def measure(base: Tensors, threads: int | None) -> dict[str, list[Row]]:
    part = {"w": torch.zeros(PART, dtype=torch.float64)}
    bf16 = Case("bf16, stochastic rounding", torch.bfloat16)
    torch_loop = Case("bf16, three rounded operations", torch.bfloat16, three_operations=True)
    cases = [
        Case("fp32, no decay", weight=0.0),
        replace(bf16, title="bf16, stochastic rounding, no decay", weight=0.0),
        Case("fp32"),
        Case("bf16, fp32 master", torch.bfloat16, "master"),
        bf16,
        torch_loop,
    ]
    l1 = Case("fp32, l1", weight=L1_LAMBDA, kind="l1")
    l1_cases = [
        l1,
        replace(l1, title="fp32, l1, five times lambda", weight=5 * L1_LAMBDA),
        replace(l1, title="bf16, stochastic rounding, l1", dtype=torch.bfloat16),
    ]
    return {
        "walks": [row for case in cases for row in norms(case, base, threads)],
        "l1": [row for case in l1_cases for row in norms(case, base, threads)],
        "l1 at rest": [row for ratio in RATIOS for row in l1_at_rest(ratio, part, threads)],
        "populations": [
            row
            for n in POPULATIONS
            for row in norms(Case(f"fp32, population {n}", weight=0.0, members=n, seed=n),
                             part, threads, (16,))
        ],
        "alphas": [
            row
            for by in (0.25, 1.0, 4.0)
            for row in norms(Case(f"fp32, alpha x {by:g}", alpha=ALPHA * by, weight=LAMBDA / by,
                                  seed=int(4 * by)), part, threads)
        ],
        "left": [row for case in (bf16, torch_loop) for row in decay_alone(case, base, threads)],
        "scales": [at_scale(s, w, threads) for w in (0.0, LAMBDA) for s in SCALES],
    }  # fmt: skip


def write(rows: dict[str, list[Row]], stamp: Row, path: Path) -> None:
    flat_rows = [{**stamp, "group": group, "scale": "", **row} for group in rows
                 for row in rows[group]]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, flat_rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--every", type=int, default=128, help="one element of so many is taken")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    base = sampled(args.model, args.every)
    elements = sum(tensor.numel() for tensor in base.values())
    made = provenance(["python", "benchmarks/forgetting/laws.py", "--model", args.model,
                       "--every", str(args.every)])  # fmt: skip
    rows = measure(base, args.threads)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    stamp = {"commit": commit(), "date": date, "device": device_name(),
             "threads": args.threads or usable_cores(), "model": args.model,
             "elements_of_model": elements}  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    write(rows, stamp, RESULTS.with_suffix(".csv"))
    draw(
        rows, RESULTS.with_suffix(".png"), f"{elements} elements of {args.model}. {one_line(made)}"
    )
    for row in (row for group in rows.values() for row in group):
        figures = f"{row['law']:12.5g}{row['measured']:12.5g}{row['measured_over_law']:9.4f}"
        print(f"{row['case']:38}{row['quantity']:18}{row['generations']:6}{figures}")


if __name__ == "__main__":
    main()
