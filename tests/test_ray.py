"""Engines as Ray actors: the result of one process, whoever dies, and scalars alone on the wire."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console
from test_cli import here, run, vowels  # noqa: F401  (fixtures)
from vllm_tiny import OPTIONS, save_tiny
from workers_driver import Numbers, Targets

from esfast import ConfigError, DataError, StateError, StrategyConfig, cli
from esfast.engines.base import Sampling
from esfast.journal import read_journal
from esfast.launch.ray import Making, RayFleet
from esfast.launch.ray_cluster import Cluster, Share
from esfast.ray_command import open_fleet
from esfast.rollout import TrainConfig
from esfast.run_folder import RunFolder
from esfast.tasks import Example, Score
from esfast.train import Trainer
from esfast.train_flags import config_of, strategy_of

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
    trainer = trainer_of(Numbers(), folder)
    result = trainer.run()
    return {"checksum": trainer.es.weights.checksum(), "rewards": rewards(folder),
            "failed": result.failed_rewards}  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict:
    """The same run with two engines."""
    folder = tmp_path_factory.mktemp("two")
    return {**train(folder, 2), "model": (folder / "run/model").read_text()}


def test_the_number_of_engines_does_not_show(two, alone):
    assert {name: two[name] for name in alone} == alone
    assert two["model"].startswith("({'by': 'a test'}") and two["memory"].ratio is not None


class Killer(Targets):
    """Kills an engine's process from outside, twice: in generation 1, and once it has rejoined."""

    fleet: RayFleet

    def __init__(self, number: int) -> None:
        super().__init__()
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


@pytest.mark.parametrize("act", ["die once", "lose once"])
def test_the_only_engine_killed(act, tmp_path, alone):
    """In the middle of a generation, by its own hand; or a process of its own."""
    told = train(tmp_path / "x", 1, act)
    assert (tmp_path / "x/died").exists() and "engine 0 died" in told["told"]
    assert {name: told[name] for name in alone} == alone


def test_engines_that_die_again_and_again_end_the_run_which_goes_on_later(
    tmp_path, alone, monkeypatch
):
    monkeypatch.setattr("esfast.launch.ray.MOST_DEATHS", 2)
    with pytest.raises(StateError, match=r"no engine is left.*--resume"):
        train(tmp_path / "x", 1, "die always")
    assert len(read_journal(tmp_path / "x/run").generations) == 2
    told = train(tmp_path / "x", 1, resume=True)
    assert {name: told[name] for name in alone} == alone


def test_engines_that_are_apart_stop_the_run_by_name(tmp_path):
    with pytest.raises(StateError, match=r"after 2 generations engine 1 has weights .* engine 0"):
        train(tmp_path / "x", 2, "apart")


def test_what_an_engine_refuses_ends_the_run_with_its_words(tmp_path):
    with pytest.raises(DataError, match=r"engine 0: prompt 3 is no prompt\."):
        train(tmp_path / "x", 1, "refuse")


def test_bytes_do_not_depend_on_the_model(tmp_path, two):
    """A model of 32 bytes and one of 3.2 MB; what differs is digits of seconds and peaks."""
    large = train(tmp_path / "x", 2, size=800_000)
    assert abs(two["bytes"] - large["bytes"]) < 4000 and large["bytes"] < 60_000


def test_snapshots_and_a_resume_with_another_number_of_engines(tmp_path, alone):
    """From a snapshot, and from one that is damaged."""
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    train(whole, 2, generations=3, snapshot_every=2)
    (path,) = (whole / "run/snapshots").iterdir()
    assert path.name == "generation-000002.safetensors"
    shutil.copytree(whole, damaged)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    (damaged / path.relative_to(whole)).write_bytes(bytes(data))
    for folder in (whole, damaged):
        told = train(folder, 1, resume=True)
        assert {name: told[name] for name in alone} == alone
        assert ("passed over" in told["told"]) == (folder == damaged)


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
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


class Letters(Targets):
    """Rewards different characters; kills the process of engine 1 in generation 1, if asked to."""

    def __init__(self, kill: bool) -> None:
        self.kill, self.scored, self.fleet = kill, 0, None

    def train_batch(self, seed, generation, count):
        return [Example(f"{generation}-{n}", f"Say {generation} and {n}.") for n in range(count)]

    def held_out(self, count):
        return [Example(f"held-{n}", f"Say {n}.") for n in range(min(count, 2))]

    def score(self, example, completion):
        return Score(float(len(set(completion))))

    def score_later(self, examples, completions):
        self.scored += 1
        if self.kill and self.scored == 1 + 4 + 1:
            os.kill(self.fleet.seats[1].pid, signal.SIGKILL)
        return super().score_later(examples, completions)


def train_vllm(folder: Path, model: Path, engines: int, kill: bool) -> dict:
    flags = [
        *("train", "--engine", "vllm", "--model", str(model), "--launcher", "ray"),
        *("--engines", str(engines), "--threads", "1", "--max-new-tokens", "6"),
        *("--population-size", "4", "--prompts", "3", "--generations", "3", "--sigma", "0.02"),
        *("--alpha", "0.02", "--checksum-every", "1", "--eval-every", "3"),
    ]
    flags += [f"--engine-option={name}={json.dumps(value)}" for name, value in OPTIONS.items()]
    args, task = cli.build_parser().parse_args(flags), Letters(kill)
    opened = open_fleet(args, folder / "run/journal.esj")
    task.fleet = opened.engine
    with closing(opened.engine):
        folder.mkdir()
        run_folder = RunFolder(folder / "run", {"made": {}})
        trainer = Trainer(
            opened.engine, task, config_of(args, strategy_of(args), task), run_folder,
            save_model=lambda path: opened.save(path, {}),
        )  # fmt: skip
        trainer.progress.console = Console(file=io.StringIO(), width=200)
        trainer.run()
        return {"checksum": trainer.es.weights.checksum(), "rewards": rewards(folder)}


def test_vllm_engines_of_which_one_is_killed(tmp_path):
    pytest.importorskip("vllm")
    model = save_tiny(tmp_path / "model")
    one = train_vllm(tmp_path / "one", model, 1, kill=False)
    assert train_vllm(tmp_path / "two", model, 2, kill=True) == one
    saved = [(tmp_path / f"{n}/run/model/model.safetensors").read_bytes() for n in ("one", "two")]
    assert saved[0] == saved[1] != (model / "model.safetensors").read_bytes()
