"""Several workers of one run, forked after the imports: what torchrun starts, without its start-up.

    python workers_driver.py FOLDER SCENARIO...

Every scenario is "WORKERS:SIZE[:act]", run in order in folders of their own: a whole training over
TorchWorkers, on an engine of SIZE numbers. Acts of two workers: "kill" ends worker 1 in a member of
generation 2; "slow" makes worker 0 take the others while worker 1 is at its first; "busy" makes
worker 0 come to a generation once worker 1 has all of it; "apart" changes a weight of worker 1
behind the run. They wait for each other, so that no clock decides who takes what. "resume" goes on
in the folder of the scenario before. Prints JSON: a list of scenarios.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
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


TAKEN = np.frombuffer(mmap.mmap(-1, 3 * GENERATIONS * 8), np.int64).reshape(3, GENERATIONS)
"""Members that each worker has taken of each generation; shared by all that are forked."""


def wait_for(worker: int, generation: int, members: int) -> None:
    end = time.monotonic() + 240
    while TAKEN[worker, generation] < members:
        assert time.monotonic() < end, f"worker {worker} took no {members} of {generation}"
        time.sleep(0.001)


class Numbers(NumberEngine):
    """Says how long its prompts were."""

    def generate(self, prompts, sampling):
        return [replace(c, prompt_tokens=3) for c in super().generate(prompts, sampling)]


def dealt(act: str, rank: int, deal: Callable) -> Callable:
    """`deal`, told to deal as `act` says: see above."""
    kills = (act, rank) == ("kill", 1)

    def told(generation: int, count: int) -> Iterator[int]:
        if rank == 0 and (act == "slow" or (act == "kill" and generation == 2)):
            wait_for(1, generation, 1)
        if rank == 0 and act == "busy":
            wait_for(1, generation, count)
        for member in deal(generation, count):
            TAKEN[rank, generation] += 1
            if kills and generation == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 1 and act == "slow":
                wait_for(0, generation, count - 1)
            yield member

    return told


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
    engine = Numbers(size=size)
    strategy = StrategyConfig(sigma=0.05, alpha=0.1, population_size=POPULATION, antithetic=True)
    config = TrainConfig(strategy, Sampling(4), GENERATIONS, PROMPTS, eval_every=2, threads=1,
                         checksum_every=2)  # fmt: skip
    told: dict = {}
    workers = join_workers()
    workers.deal = dealt(act, rank, workers.deal)
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


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def main(folder: Path, scenarios: list[str]) -> None:
    out, place = [], folder / "none"
    for number, scenario in enumerate(scenarios):
        count, size, act = [*scenario.split(":"), "plain"][:3]
        place = place if act == "resume" else folder / str(number)
        TAKEN[:], port = 0, free_port()
        children = [
            start(rank, int(count), int(size), act, place, port) for rank in range(int(count))
        ]
        for child in children:
            os.waitpid(child, 0)
        files = [place.with_name(f"{place.name}-{act}-{rank}.json") for rank in range(int(count))]
        out.append([json.loads(f.read_text()) if f.exists() else {} for f in files])
    print(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
