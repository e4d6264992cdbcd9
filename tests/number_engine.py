"""An engine of eight numbers, a task that they learn, and a trainer over both: the loop, no model.

An answer is a weight, so a test can read which weights were asked.
"""

from __future__ import annotations

import io
import signal

import torch
from rich.console import Console

from esfast import ParameterTable, StrategyConfig
from esfast.engines.base import Completion, Sampling
from esfast.progress import RunProgress
from esfast.run_folder import RunFolder
from esfast.tasks import Example, Score, Task
from esfast.train import TrainConfig, Trainer
from esfast.weights import weights_of

SIZE = 8


class NumberEngine:
    """Answers prompt "i" with its i-th weight; `before_call(n)` runs before the n-th generate."""

    def __init__(self, before_call=lambda call: None, size=SIZE):
        self.weights = torch.zeros(size)
        self._table = ParameterTable.from_tensors({"weights": self.weights})
        self.calls = 0
        self.seen: list[list[str]] = []
        self.before_call = before_call

    def live_weights(self, memory="lean", anchor=False, threads=None):
        return weights_of(self._table, memory, anchor, threads)

    def generate(self, prompts, sampling):
        self.before_call(self.calls)
        self.calls += 1
        self.seen.append(list(prompts))
        return [Completion(f"{self.weights[int(p)].item():.9g}", 1, True) for p in prompts]

    def weights_changed(self):
        pass

    def close(self):
        pass


class Targets(Task):
    """Weight i should become i / SIZE; trained on and held out are the same prompts."""

    name = "targets"
    max_new_tokens = 4

    def __init__(self, fail_on=()):
        self.fail_on = fail_on

    def train_batch(self, seed, generation, count):
        return [Example(f"{generation}-{n}", str(n % SIZE)) for n in range(count)]

    def held_out(self, count):
        return [Example(f"held-{n}", str(n)) for n in range(min(count, SIZE))]

    def score(self, example, completion):
        if example.prompt in self.fail_on:
            raise ValueError("no score today")
        error = abs(float(completion) - int(example.prompt) / SIZE)
        return Score(-error, "closer", solved=error < 0.05)


def make_trainer(tmp_path, engine=None, task=None, saved=None, **settings) -> Trainer:
    strategy = {"sigma": 0.05, "alpha": 0.1, "population_size": 16, "antithetic": True, "seed": 5}
    strategy |= settings.pop("strategy", {})
    config = TrainConfig(
        **{
            "strategy": StrategyConfig(**strategy),
            "sampling": Sampling(4),
            "generations": 6,
            "prompts": SIZE,
            "eval_every": 2,
            **settings,
        }
    )
    made = {"made": {"esfast": "0", "commit": None, "noise_version": 1, "target": "t",
                     "started": "now", "command": "test"}}  # fmt: skip
    saves = [] if saved is None else saved
    trainer = Trainer(
        engine or NumberEngine(),
        task or Targets(),
        config,
        RunFolder(tmp_path / "run", made),
        save_model=lambda path: saves.append(path),
    )
    text = Console(file=io.StringIO(), width=200)
    trainer.progress = RunProgress(config.generations, config.strategy.population_size, text)
    return trainer


def shown(trainer: Trainer) -> str:
    return trainer.progress.console.file.getvalue()


def interrupt_at(call: int):
    """A real SIGINT in the middle of a generate, as Ctrl-C sends it."""
    return lambda now: signal.raise_signal(signal.SIGINT) if now == call else None
