"""Small runs for the tests of `esfast forgetting`, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from test_cli import run

from esfast import EvolutionStrategy
from esfast.models import load_model
from esfast.replay import keep_journal

GENERATIONS = 4


def command(*arguments: str) -> int:
    """The exit code of `esfast forgetting ARGUMENTS`, in this process."""
    return run("forgetting", *map(str, arguments))


def train(base: Path, folder: Path, dtype: str, **settings: object) -> None:
    """A run of drawn rewards with a journal and a config.json; its weights saved on the way."""
    loaded = load_model(base, dtype=getattr(torch, dtype))
    chosen = {"sigma": 0.02, "alpha": 0.02, "population_size": 6, **settings}
    es = EvolutionStrategy(loaded.model, threads=1, **chosen)
    folder.mkdir()
    with keep_journal(es, folder / "journal.esj", checksum_every=2):
        for number in range(GENERATIONS):
            es.step(np.random.default_rng(number).normal(size=6))
            loaded.model.save_pretrained(folder / f"saved-{number + 1}")
    config = {"arguments": {"task": "arithmetic", "task_option": []}}
    (folder / "config.json").write_text(json.dumps(config))


def found(folder: Path) -> dict:
    return json.loads((folder / "forgetting.json").read_text())


def numbers(tensors) -> np.ndarray:
    return np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])
