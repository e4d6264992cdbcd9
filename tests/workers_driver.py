"""Several workers of one run, forked after the imports: what torchrun starts, without its start-up.

    python workers_driver.py FOLDER PORT SCENARIO...

Every scenario is "WORKERS:SIZE[:act]", run in order in folders of their own: a whole training over
TorchWorkers, on an engine of SIZE numbers. Acts: "kill" ends the last worker in generation 2;
"resume" goes on in the folder of the scenario before; "slow" makes worker 1 take 100 ms a member;
"busy" makes worker 0 take so long over the held-out prompts that others have the next generation;
"apart" changes a weight of the last worker behind the run. Prints JSON: a list of scenarios.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import number_engine
import numpy as np
from number_engine import NumberEngine
from rich.console import Console

from esfast import EsfastError, StrategyConfig
from esfast.engines.base import Sampling
from esfast.journal import parse
from esfast.launch.torchrun import join_workers
from esfast.measure import Clock
from esfast.replay import catch_up
from esfast.rollout import Rollout, TrainConfig, follow, strategy_over
from esfast.run_folder import RunFolder
from esfast.train import Trainer

GENERATIONS, POPULATION, PROMPTS = 5, 8, 8


class Numbers(NumberEngine):
    """Does as `act` says: see above. `last`: it is the last of several workers."""

    def __init__(self, size: int, act: str, rank: int, last: bool) -> None:
        super().__init__(size=size)
        self.act, self.rank, self.last = act, rank, last

    def generate(self, prompts, sampling):
        if self.act == "kill" and self.last and sampling.seed == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.act == "slow" and self.rank == 1:
            time.sleep(0.1)
        if self.act == "busy" and self.rank == 0 and len(prompts) != PROMPTS:
            time.sleep(0.5)
        return [replace(c, prompt_tokens=3) for c in super().generate(prompts, sampling)]


class Targets(number_engine.Targets):
    """One prompt's scoring always fails."""

    def __init__(self) -> None:
        super().__init__(fail_on=("3",))


def lead(engine: Numbers, config: TrainConfig, folder: Path, resume: bool, workers) -> dict:
    run_folder = RunFolder(folder, {"made": {}}, {} if resume else None)
    trainer = Trainer(engine, Targets(), config, run_folder, save_model=lambda path: None)
    trainer.progress.console = Console(file=io.StringIO())
    trainer.rollout.workers = workers
    result = trainer.run()
    rates = [row["tokens_per_second"] for row in run_folder.lines()]
    return {
        "checksum": trainer.es.weights.checksum(),
        "failed": result.failed_rewards,
        "reasons": sum(reason["count"] for reason in result.failures),
        "cost": trainer.account.counts(),
        "fastest": max(rates),
    }


def other(engine: Numbers, config: TrainConfig, act: str, workers) -> dict:
    rollout = Rollout(engine, Targets(), config, Clock())
    rollout.workers = workers
    es = strategy_over(engine, config)
    catch_up(es, parse(workers.share(None), "the leader's"))
    if act == "apart":
        engine.weights[0] += 1
    follow(rollout, es, config.generations)
    return {"checksum": es.weights.checksum()}


def bits(rank: int, count: int, workers) -> str:
    """Every worker's row of numbers that a sum of floats would change, gathered, as hex."""
    rows = np.zeros((count, 4))
    rows[rank] = -0.0, np.nan, 0.1 + rank, 5e-324
    return workers.gather(rows).tobytes().hex()


def work(rank: int, count: int, size: int, act: str, folder: Path) -> dict:
    engine = Numbers(size, act, rank, rank == count - 1 > 0)
    strategy = StrategyConfig(sigma=0.05, alpha=0.1, population_size=POPULATION, antithetic=True)
    config = TrainConfig(strategy, Sampling(4), GENERATIONS, PROMPTS, eval_every=2, threads=1,
                         checksum_every=2)  # fmt: skip
    told: dict = {}
    workers = join_workers()
    try:
        if rank == 0:
            told = lead(engine, config, folder, act == "resume", workers)
        else:
            told = other(engine, config, act, workers)
    except EsfastError as error:
        told = {"error": str(error)}
    if "error" not in told:
        told["bits"] = bits(rank, count, workers)
    told |= {"asked": engine.calls, "sent": workers.bytes_sent}
    workers.close()
    return told


def start(rank: int, count: int, size: int, act: str, folder: Path, port: int) -> int:
    child = os.fork()
    if child:
        return child
    if count > 1:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), **place}
    try:
        told = work(rank, count, size, act, folder)
    except BaseException as error:
        told = {"bug": f"{type(error).__name__}: {error}"}
    folder.with_name(f"{folder.name}-{act}-{rank}.json").write_text(json.dumps(told))
    os._exit(0)


def main(folder: Path, port: int, scenarios: list[str]) -> None:
    out, place = [], folder / "none"
    for number, scenario in enumerate(scenarios):
        count, size, act = [*scenario.split(":"), "plain"][:3]
        place = place if act == "resume" else folder / str(number)
        children = [
            start(rank, int(count), int(size), act, place, port + number)
            for rank in range(int(count))
        ]
        for child in children:
            os.waitpid(child, 0)
        files = [place.with_name(f"{place.name}-{act}-{rank}.json") for rank in range(int(count))]
        out.append([json.loads(f.read_text()) if f.exists() else {} for f in files])
    print(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
