"""What actors of the Ray tests hold: engines of a few numbers that die, or go apart, as told."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from workers_driver import Numbers

from esfast.errors import DataError, LostError
from esfast.launch.ray_actor import Hosted
from esfast.strategy import StrategyConfig


class Told(Numbers):
    """Numbers with acts: "die once" in the middle of generation 2, "die always", "lose once" a
    process of the engine's, "refuse" a prompt, "apart": another weight than everybody's after
    an update, "slow"."""

    def __init__(self, size: int, act: str, folder: Path) -> None:
        super().__init__(size=size)
        self.told, self.folder = act, folder

    def first(self, name: str) -> bool:
        """Whether no actor has done this before."""
        try:
            (self.folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def live_weights(self, memory: Any = "lean", anchor: Any = False, threads: Any = None) -> Any:
        self.live = super().live_weights(memory, anchor, threads)
        return self.live

    def weights_changed(self) -> None:
        if self.told == "apart" and not self.live.perturbed and self.first("moved"):
            self.weights[0] += 1

    def generate(self, prompts: Any, sampling: Any) -> Any:
        if self.told == "slow" or self.told.startswith("die"):
            time.sleep(0.05)
        if self.told == "die once" and sampling.seed == 2 and self.first("died"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.told == "die always" and sampling.seed == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.told == "lose once" and sampling.seed == 2 and self.first("died"):
            raise LostError("a process is gone.")
        if self.told == "refuse" and sampling.seed == 2:
            raise DataError("prompt 3 is no prompt.")
        return super().generate(prompts, sampling)


def numbers(arguments: dict[str, Any]) -> Hosted:
    """Called in the actor."""
    engine = Told(arguments["size"], arguments["act"], Path(arguments["folder"]))
    return Hosted(
        engine,
        StrategyConfig(**arguments["strategy"]),
        None,
        lambda path, made: path.write_text(repr((made, engine.weights.tolist()))),
    )
