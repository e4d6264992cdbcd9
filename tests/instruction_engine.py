r"""An engine whose answers depend on eight weights and on the instruction; no model.

A prompt is "INSTRUCTION\n\nI"; its answer is the I-th weight, moved closer to the target by the "!"
of the instruction, most where their number fits I: no instruction is best at all. Asked to reflect,
it answers with the instruction and one "!" more.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from number_engine import SIZE, NumberEngine, Targets
from rich.console import Console

from esfast import StrategyConfig
from esfast.engines.base import Completion, Sampling
from esfast.fast_slow.instructed import Instructed
from esfast.fast_slow.trainer import FastSlowConfig, FastSlowTrainer
from esfast.run_folder import RunFolder

MADE = {"made": {"esfast": "0"}, "model": "numbers", "task": {"name": "targets"}}


class InstructionEngine(NumberEngine):
    """`seen` are the lists of prompts, each with how they were sampled."""

    def generate(self, prompts, sampling):
        self.before_call(len(self.seen))
        self.seen.append((list(prompts), sampling))
        return [Completion(self._answer(p), 2, True, (), len(p)) for p in prompts]

    def _answer(self, prompt):
        if "Your task is to write a new instruction" in prompt:
            return f"Here it is:\n```\n{prompt.split('```')[1].strip()}!\n```"
        instruction, _, number = prompt.rpartition("\n\n")
        weight = self.weights[int(number)].item()
        missing, marks = int(number) / SIZE - weight, instruction.count("!")
        helped = min(marks, 4) / 16 + (marks % 3 == int(number) % 3 and marks > 0) / 2
        return f"{weight + missing * helped:.9g}"


class Stubborn(InstructionEngine):
    """Every "!" does harm: the first instruction stays the best."""

    def _answer(self, prompt):
        if "new instruction" in prompt:
            return super()._answer(prompt)
        return f"{float(super()._answer(prompt.replace('!', ''))) - prompt.count('!'):.9g}"


def make_trainer(
    path: Path, engine: Any = None, goes_on: bool = False, task: Any = None, **settings: Any
) -> FastSlowTrainer:
    """Two cycles of two generations, a population of 8, two prompts kept."""
    reflection = settings.pop("reflection", None)
    strategy = {"sigma": 0.05, "alpha": 0.1, "population_size": 8, "antithetic": True, "seed": 5,
                "shaping": "group_centered", **settings.pop("strategy", {})}  # fmt: skip
    defaults = {"generations": 4, "prompts": SIZE, "eval_every": 5, "generations_per_cycle": 2,
                "kept_prompts": 2, "metric_calls": 60, "pareto_size": 6,
                "instruction": "Count."}  # fmt: skip
    config = FastSlowConfig(StrategyConfig(**strategy), Sampling(4), **{**defaults, **settings})
    made = FastSlowTrainer(
        engine or InstructionEngine(),
        Instructed(task or Targets(), config.instruction),
        config,
        RunFolder(path, MADE, {} if goes_on else None),
        save_model=lambda folder: None,
        reflection=reflection,
    )
    made.progress.console = Console(file=io.StringIO(), width=300)
    return made
