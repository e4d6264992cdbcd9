"""Whole run folders, as `esfast train`, prior tasks and `esfast forgetting` leave them.

The journal is of steps on random rewards and its drift is measured; the other numbers are made up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esfast import AnchoredDecay, EvolutionStrategy, ParameterTable
from esfast.forgetting.change import THRESHOLDS, ULPS
from esfast.forgetting.drift import drift
from esfast.forgetting.energy import SHARES
from esfast.forgetting.groups import GROUPS
from esfast.journal_format import MarkRecord
from esfast.prior.scores import Estimate, PriorScore
from esfast.replay import keep_journal

EVIL = '</pre><script>alert("1")</script><img src=http://example.org/x>\u202egnol'
MEMBERS, DONE = 4, 3


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (20, 8), "model.norm.weight": (8,)}
    for layer in range(2):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
            shapes[f"model.layers.{layer}.{part}.weight"] = (8, 8)
    return {n: (torch.randn(s, generator=generator) / 16).bfloat16() for n, s in shapes.items()}


def held_out(generation: int, mean: float) -> dict[str, Any]:
    interval = [mean - 0.05, mean + 0.05]
    return {"generation": generation, "prompts": 9, "score": mean, "score_95": interval,
            "solved": 0.5, "solved_95": [0.2, 0.8], "failed_rewards": 0}  # fmt: skip


def config(seed: int, method: str, decay: AnchoredDecay | None) -> dict[str, Any]:
    strategy = {"sigma": 1e-3, "alpha": 0.01, "population_size": MEMBERS, "seed": seed,
                "decay": decay and {"kind": decay.kind, "weight": decay.weight}}  # fmt: skip
    settings: dict[str, Any] = {"generations": DONE, "prompts": 5}
    settings |= {"strategy": strategy} if method == "es" else {"learning_rate": 1e-5, "seed": seed}
    made = {"esfast": "0.1.0", "noise_version": 1, "target": "scalar", "commit": "abc123",
            "command": f"esfast train --seed {seed}", "started": "2026-01-01T00:00:00+00:00",
            "python": "3.11", "platform": "Linux", "packages": {"torch": "2.13"}}  # fmt: skip
    return {"made": made, "method": method, "model": "tiny", "dtype": "bfloat16", "device": "cpu",
            "task": {"name": "sums", "digest": "feed"}, "settings": settings}  # fmt: skip


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def trained(folder: Path, seed: int, decay: AnchoredDecay | None) -> dict[str, torch.Tensor]:
    """A journal of random rewards in `folder`; the tuned weights."""
    live = weights()
    es = EvolutionStrategy(ParameterTable.from_tensors(live), alpha=0.01, seed=seed, decay=decay,
                           population_size=MEMBERS, threads=1)  # fmt: skip
    rng = np.random.default_rng(seed)
    with keep_journal(es, folder / "journal.esj") as journal:
        for _ in range(DONE):
            es.step(rng.normal(size=MEMBERS))
        journal.append(MarkRecord(DONE, es.weights.checksum()))
    return live


def prior_scores() -> list[dict[str, Any]]:
    """A task that dips and comes back."""
    courses = {"capitals": (0.9, 0.4, 0.7), "folder/plurals.jsonl": (0.5, 0.5, 0.6)}
    return [
        PriorScore(
            generation=generation, task=task, source=task, metric="score", prompts=20,
            greedy=Estimate.of([mean - 0.1, mean + 0.1] * 10),
            sampled=Estimate.of([mean - 0.2, mean] * 10, 4, 1.0),
        ).record()
        for task, means in courses.items()
        for generation, mean in zip((0, 1, 3), means, strict=True)
    ]  # fmt: skip


def kl_entries() -> list[dict[str, Any]]:
    part = {"value": 0.125, "low": 0.1, "high": 0.15}
    parts = dict.fromkeys(("token_weighted", "prompt_averaged", "sequence"), part)
    return [
        {"generation": at, "prompts": "capitals", "kind": "prior", "direction": direction,
         "samples_from": source, "count": 8, "tokens": 77, "exact": parts, "log_ratio": parts}
        for at in (1, DONE)
        for direction, source in (("KL(base || tuned)", "base"), ("KL(tuned || base)", "tuned"))
    ]  # fmt: skip


def diagnosis(source: Path, kind: str, tuned: dict[str, torch.Tensor]) -> dict[str, Any]:
    """forgetting.json of one subject; the change is measured, KL made up."""
    at = DONE if kind == "run" else None
    measured = {"generation": at, "checksum": None, **drift(weights(), tuned).record()}
    kl = [entry for entry in kl_entries() if kind == "run"]
    subject = {"name": source.name, "kind": kind, "source": str(source), "generations": at,
               "chain": None, "settings": None, "dtype": "bfloat16", "drift": [measured],
               "kl": kl, "scores": []}  # fmt: skip
    control = {"name": "random direction 0", "kind": "random", "generation": None, "norm": 1.25,
               "scale": 2.0, "seed": 0, "kl": kl[:1], "scores": []}  # fmt: skip
    control["scores"] = [{**held_out(0, 0.31), "prompts": "capitals", "kind": "prior"}]
    return {"format": "esfast-forgetting", "version": 1, "made": {}, "groups": list(GROUPS),
            "base": {"model": "tiny", "dtype": "bfloat16", "elements": 1}, "ulps": list(ULPS),
            "thresholds": list(THRESHOLDS), "energy_shares": list(SHARES), "subjects": [subject],
            "samples": None, "notes": ["A note of the diagnosis."],
            "equal_norm": {"norm": 1.25, "reference": source.name, "by": "whole",
                           "controls": [control]}}  # fmt: skip


def run_folder(
    path: Path, seed: int = 0, method: str = "es", decay: AnchoredDecay | None = None
) -> Path:
    """A whole run folder, as esfast train, prior tasks and esfast forgetting leave it."""
    write(path / "config.json", config(seed, method, decay))
    counts = {"prompt": 10, "generated": 20, "reread": 0, "backward": 0}
    write_lines(path / "metrics.jsonl", [
        {"generation": n, "reward_mean": 0.1 * n, "reward_spread": 0.05, "failed_rewards": 0,
         "reward_best": 0.3, "total_seconds": {"generation": 2.0 * n},
         "cost": {"training": counts, "evaluation": counts},
         "held_out": held_out(n, 0.3 + 0.1 * n) if n != 1 else None}
        for n in range(1, DONE + 1)
    ])  # fmt: skip
    flops = {"forward_flops": 60000, "backward_flops": 0, "flops": 60000}
    cost = {"parameters": 1000, "formula": "as esfast counts", "training": {**counts, **flops}}
    write(path / "summary.json", {
        "status": "finished", "generations": DONE, "rise": 0.3, "rise_in_standard_errors": 5.25,
        "held_out_before": held_out(0, 0.3), "held_out_after": held_out(DONE, 0.6),
        "seconds": {"generation": 190.0, "update": 10.0, "prior tasks": 30.0}, "cost": cost,
        "outside_share_of_loop": 0.05, "peak_bytes": 3_000_000_000, "peak_over_inference": 1.5,
    })  # fmt: skip
    answer = {"answer": EVIL, "score": 0.25, "generation": 0}
    asked = [{"role": "user", "content": "2 + 2?"}]
    answers = {"before": answer, "after": {**answer, "generation": DONE}}
    write(path / "samples.json", [{"prompt": asked, **answers}])
    write_lines(path / "prior.jsonl", prior_scores())
    tuned = trained(path, seed, decay) if method == "es" else weights(seed)
    kind, source = ("run", path) if method == "es" else ("checkpoint", path / "model")
    write(path / "forgetting" / "forgetting.json", diagnosis(source, kind, tuned))
    return path
