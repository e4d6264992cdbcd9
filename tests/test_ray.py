"""Engines as Ray actors: the result of one process, whoever dies, and scalars alone on the wire."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_cli import here, run, tiny_model, vowels  # noqa: F401  (fixtures)
from workers_driver import Numbers, Targets

from esfast import ConfigError, DataError, StateError, StrategyConfig
from esfast.engines.base import Sampling
from esfast.journal import read_journal
from esfast.launch.ray import Making, RayFleet
from esfast.launch.ray_cluster import Cluster, Share
from esfast.rollout import TrainConfig
from esfast.run_folder import RunFolder
from esfast.train import Trainer

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.vllm  # ray lives in that environment

STRATEGY = {"sigma": 0.05, "alpha": 0.1, "population_size": 8, "antithetic": True}


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    """One local cluster for all tests, on which a run finds itself connected already."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def config(**settings) -> TrainConfig:
    settings = {"generations": 5, "prompts": 8, "eval_every": 2, "checksum_every": 2, **settings}
    return TrainConfig(StrategyConfig(**STRATEGY), Sampling(4), threads=1, **settings)


def making(folder: Path, act: str = "plain", size: int = 8) -> Making:
    arguments = {"size": size, "act": act, "folder": str(folder), "strategy": STRATEGY}
    return Making("ray_hosts:numbers", arguments, Share(1))


def trainer_of(engine, folder: Path, resume: bool = False, task=None, **settings) -> Trainer:
    run_folder = RunFolder(folder / "run", {"made": {}}, {} if resume else None)
    saves = getattr(engine, "save", lambda path, made: None)
    trainer = Trainer(
        engine, task or Targets(), config(**settings), run_folder,
        save_model=lambda path: saves(path, {"by": "a test"}),
    )  # fmt: skip
    trainer.progress.console = Console(file=io.StringIO(), width=200)
    return trainer


def train(folder: Path, engines: int, act: str = "plain", **settings) -> dict:
    """A whole run over actors; what came of it."""
    task, resume, size = (settings.pop(n, d) for n, d in (("task", None), ("resume", False),
                                                         ("size", 8)))  # fmt: skip
    folder.mkdir(exist_ok=True)
    fleet = RayFleet(Cluster(), making(folder, act, size), engines, folder / "run/journal.esj")
    try:
        trainer = trainer_of(fleet, folder, resume, task, **settings)
        if task is not None:
            task.fleet = fleet
        result = trainer.run()
        return {
            "checksum": trainer.es.weights.checksum(),
            "rewards": rewards(folder),
            "told": trainer.progress.console.file.getvalue(),
            "failed": result.failed_rewards,
            "bytes": fleet.bytes_sent + fleet.bytes_received,
            "memory": result.memory,
            "seats": fleet.seats,
            "record": result.record(),
        }
    finally:
        fleet.close()


def rewards(folder: Path) -> list[list[float]]:
    return [record.rewards.tolist() for record in read_journal(folder / "run").generations]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """The same run in this process, without Ray."""
    folder = tmp_path_factory.mktemp("alone")
    trainer = trainer_of(Numbers(8, "plain", 0, False), folder)
    result = trainer.run()
    return {"checksum": trainer.es.weights.checksum(), "rewards": rewards(folder),
            "failed": result.failed_rewards}  # fmt: skip


@pytest.mark.parametrize("engines", [1, 2])
def test_the_number_of_engines_does_not_show(tmp_path, alone, engines):
    told = train(tmp_path / "x", engines)
    assert {name: told[name] for name in alone} == alone
    assert (tmp_path / "x/run/model").read_text().startswith("({'by': 'a test'}")
    assert told["memory"].ratio is not None


def test_an_engine_killed_in_the_middle_of_a_generation(tmp_path, alone):
    told = train(tmp_path / "x", 2, "die once")
    assert (tmp_path / "x/died").exists() and "died" in told["told"]
    assert {name: told[name] for name in alone} == alone


class Killer(Targets):
    """Kills an engine's process from outside, twice: in generation 1, and once it has rejoined."""

    fleet: RayFleet

    def __init__(self, number: int) -> None:
        self.number, self.scored, self.killed = number, 0, []

    def score_later(self, examples, completions):
        self.scored += 1
        seat = self.fleet.seats[self.number]
        if self.scored == 1 + 2 * 8 + 1 and seat.joining is not None:
            ray.wait([seat.joining])
        if self.scored in (1 + 8 + 2, 1 + 3 * 8 + 5):  # held-out, a generation, two of the next
            assert seat.generation == self.fleet.done
            os.kill(seat.pid, signal.SIGKILL)
            self.killed.append(seat.pid)
        return super().score_later(examples, completions)


def test_an_engine_killed_twice_replays_and_rejoins(tmp_path, alone):
    task = Killer(1)
    told = train(tmp_path / "x", 2, "slow", task=task)
    assert len(set(task.killed)) == 2 and {name: told[name] for name in alone} == alone
    assert told["told"].count("it is started again") == 2


def test_the_only_engine_killed(tmp_path, alone):
    told = train(tmp_path / "x", 1, "die once")
    assert {name: told[name] for name in alone} == alone


def test_engines_that_die_again_and_again_end_the_run_which_goes_on_later(tmp_path, alone):
    with pytest.raises(StateError, match=r"no engine is left.*--resume"):
        train(tmp_path / "x", 1, "die always")
    assert len(read_journal(tmp_path / "x/run").generations) == 2
    told = train(tmp_path / "x", 1, resume=True)
    assert {name: told[name] for name in alone} == alone


def test_engines_that_are_apart_stop_the_run_by_name(tmp_path):
    with pytest.raises(StateError, match=r"after 2 generations engine 1 has weights .* engine 0"):
        train(tmp_path / "x", 2, "apart")


def test_what_an_engine_refuses_ends_the_run_with_its_words(tmp_path):
    with pytest.raises(DataError, match=r"engine [01]: prompt 3 is no prompt\."):
        train(tmp_path / "x", 2, "refuse")


def test_bytes_do_not_depend_on_the_model(tmp_path):
    """A model of 32 bytes and one of 3.2 MB; what differs is digits of seconds and peaks."""
    small, large = (train(tmp_path / str(n), 2, size=n) for n in (8, 800_000))
    assert abs(small["bytes"] - large["bytes"]) < 4000 and large["bytes"] < 60_000


def test_snapshots_and_a_resume_with_another_number_of_engines(tmp_path, alone):
    train(tmp_path / "x", 2, generations=3, snapshot_every=2)
    assert [p.name for p in (tmp_path / "x/run/snapshots").iterdir()] == [
        "generation-000002.safetensors"
    ]
    told = train(tmp_path / "x", 1, resume=True)
    assert {name: told[name] for name in alone} == alone
    assert "passed over" not in told["told"]


def test_a_snapshot_that_is_damaged_is_passed_over(tmp_path, alone):
    train(tmp_path / "x", 1, generations=3, snapshot_every=2)
    (path,) = (tmp_path / "x/run/snapshots").iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    told = train(tmp_path / "x", 2, resume=True)
    assert {name: told[name] for name in alone} == alone and "passed over" in told["told"]


DRIVER = """
import os, signal, sys
from pathlib import Path
import ray, test_ray
ray.init(address=sys.argv[2], log_to_driver=False)

class Dies(test_ray.Targets):
    scored = 0
    def score_later(self, examples, completions):
        Dies.scored += 1
        if Dies.scored == 1 + 3 * 8 + 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score_later(examples, completions)

test_ray.train(Path(sys.argv[1]), 2, task=Dies())
"""


def test_a_killed_driver_is_resumed(tmp_path, alone):
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "x"), address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    recorded = len(read_journal(tmp_path / "x/run").generations)
    assert 2 <= recorded < 5
    told = train(tmp_path / "x", 2, resume=True)
    assert {name: told[name] for name in alone} == alone


def test_more_engines_than_the_cluster_holds_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"9 engines of 1 CPU each need 9, and .* has 4"):
        RayFleet(Cluster(), making(tmp_path), 9)
    gpus = Making("ray_hosts:numbers", {}, Share(1, gpus=1))
    with pytest.raises(ConfigError, match=r"1 engines of 1 GPU each need 1, and .* has 0"):
        RayFleet(Cluster(), gpus, 1)


def test_an_engine_that_cannot_be_made_says_why(tmp_path):
    making_none = Making("ray_hosts:numbers", {**making(tmp_path).arguments, "strategy":
                                               {"sigma": -1.0}}, Share(1))  # fmt: skip
    with pytest.raises(ConfigError, match=r"engine 0: sigma is -1\.0"):
        RayFleet(Cluster(), making_none, 1)


def test_the_command_gives_the_model_of_one_process(vowels, here):  # noqa: F811
    """The real command, engine and model: one process, and two engines under Ray."""
    flags = [*vowels, "--generations", "3", "--threads", "1", "--no-plots"]
    assert run(*flags) == 0
    where = flags.index("--output") + 1
    flags[where] = "under-ray"
    assert run(*flags, "--launcher", "ray", "--engines", "2") == 0
    weights = [Path(p, "model/model.safetensors").read_bytes() for p in ("run", "under-ray")]
    assert weights[0] == weights[1]
    assert rewards_of("run") == rewards_of("under-ray")
    assert json.loads(Path("under-ray/config.json").read_text())["arguments"]["engines"] == 2


def rewards_of(folder: str) -> list[list[float]]:
    return [record.rewards.tolist() for record in read_journal(folder).generations]
