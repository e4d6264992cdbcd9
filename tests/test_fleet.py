"""The queue of members, deaths and rejoining, on a cluster that is only played: no Ray is needed.

`Stage` stands in for Ray: actors are objects of this process, requests to one are answered in
order, replies arrive in a random order, and an actor may die at any request, before or after it has
done what was asked. Whatever happens, the run's result is that of one process.
"""

from __future__ import annotations

import io
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from workers_driver import Numbers, Targets

from esfast import StateError, StrategyConfig
from esfast.engines.base import Completion, Sampling
from esfast.engines.fleet import Fleet
from esfast.journal import read_journal
from esfast.launch.ray import Making, RayFleet
from esfast.launch.ray_actor import Hosted, completion_of, completion_record
from esfast.launch.ray_cluster import Share, last_line
from esfast.live_weights import LiveWeights
from esfast.measure import GENERATION, PERTURB, SCORING, Clock
from esfast.rollout import TrainConfig
from esfast.run_folder import RunFolder
from esfast.train import Trainer

STRATEGY = {"sigma": 0.05, "alpha": 0.1, "population_size": 8, "antithetic": True}
MAKING = Making("test_fleet:hosted", {}, Share(1))


def hosted(arguments) -> Hosted:
    return Hosted(Numbers(), StrategyConfig(**STRATEGY), None, lambda *_: None)


class TaskError(Exception):
    def __init__(self, cause):
        self.cause = cause


class ActorError(Exception):
    pass


class Reply:
    def __init__(self, actor, name, data):
        self.actor, self.name, self.data, self.done = actor, name, data, False


class Actor:
    """Answers in order; dies with probability `risk` at each request."""

    def __init__(self, kind, rng, risk):
        self.held, self.rng, self.risk = kind(), rng, risk
        self.queue: list[Reply] = []
        self.answer = SimpleNamespace(remote=self.ask)
        self.dead = False

    def ask(self, name, data):
        reply = Reply(self, name, data)
        self.queue.append(reply)
        return reply

    def run_until(self, reply):
        while not reply.done:
            self.run(self.queue.pop(0))

    def run(self, one):
        one.done = True
        dies, after = self.rng.random() < self.risk, self.rng.random() < 0.5
        self.dead = self.dead or (dies and not after)
        if self.dead:
            one.error = ActorError("it is gone")
            return
        try:
            one.result, one.error = self.held.answer(one.name, one.data), None
        except Exception as error:
            one.error = TaskError(error)
        if dies:
            self.dead, one.error = True, ActorError("it went")


class Stage:
    """What `RayFleet` asks of a cluster and of ray."""

    exceptions = SimpleNamespace(
        RayTaskError=TaskError, RayActorError=ActorError,
        ObjectLostError=ActorError, WorkerCrashedError=ActorError,
    )  # fmt: skip

    def __init__(self, seed=0, risk=0.0):
        self.ray, self.rng, self.risk = self, random.Random(seed), risk
        self.started = 0

    def require(self, engines, share):
        pass

    def actor(self, kind, share):
        self.started += 1
        return Actor(kind, self.rng, self.risk)

    def wait(self, replies, timeout=None):
        one = self.rng.choice(list(replies))
        one.actor.run_until(one)
        return [one], [other for other in replies if other is not one]

    def get(self, reply):
        reply.actor.run_until(reply)
        if reply.error is not None:
            raise reply.error
        return reply.result

    def kill(self, actor):
        actor.dead = True

    def close(self):
        pass


def train(folder: Path, engine, generations=5, resume=False, **settings):
    config = TrainConfig(StrategyConfig(**STRATEGY), Sampling(4), generations, prompts=8,
                         eval_every=2, threads=1, checksum_every=2, **settings)  # fmt: skip
    trainer = Trainer(
        engine, Targets(), config, RunFolder(folder / "run", {"made": {}}, {} if resume else None),
        save_model=lambda path: None,
    )  # fmt: skip
    trainer.progress.console = Console(file=io.StringIO(), width=200)
    result = trainer.run()
    recorded = [r.rewards.tolist() for r in read_journal(folder / "run").generations]
    return trainer.es.weights.checksum(), recorded, result.failed_rewards


def fleet_on(stage: Stage, folder: Path, engines: int) -> RayFleet:
    return RayFleet(stage, MAKING, engines, folder / "run/journal.esj", note=lambda text: None)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone"), Numbers())


def test_a_fleet_is_an_engine_and_its_weights_are_live_weights(tmp_path):
    fleet = fleet_on(Stage(), tmp_path, 2)
    assert isinstance(fleet, Fleet) and not isinstance(Numbers(), Fleet)
    assert isinstance(fleet.live_weights(), LiveWeights)


@pytest.mark.parametrize("engines", [1, 2, 5])
def test_the_number_of_engines_and_the_order_do_not_show(tmp_path, alone, engines):
    stage = Stage(seed=engines)
    assert train(tmp_path, fleet_on(stage, tmp_path, engines)) == alone
    assert stage.started == engines


@pytest.mark.parametrize("seed", range(12))
def test_engines_that_die_anywhere_do_not_show(tmp_path, alone, seed, monkeypatch):
    """At any request: a member, an update, a checksum, a join, a snapshot, the start."""
    monkeypatch.setattr("esfast.launch.ray.MOST_DEATHS", 10**6)
    stage = Stage(seed, risk=0.12)
    fleet = fleet_on(stage, tmp_path, 1 + seed % 3)
    assert train(tmp_path, fleet, generations=3, snapshot_every=2)[1] == alone[1][:3]
    again = Stage(100 + seed, risk=0.12)
    assert train(tmp_path, fleet_on(again, tmp_path, 1 + seed % 2), resume=True) == alone
    assert stage.started + again.started > 5  # 2 to 5 are wanted; the others replace dead ones


def test_an_engine_that_dies_too_often_is_given_up_and_the_others_go_on(tmp_path, alone):
    stage, told = Stage(), []
    fleet = fleet_on(stage, tmp_path, 2)
    fleet.note = told.append
    plain = stage.actor

    def doomed(kind, share):
        actor = plain(kind, share)
        if stage.started > 2:
            actor.dead = True
        return actor

    stage.actor = doomed
    fleet.seats[1].actor.dead = True
    assert train(tmp_path, fleet) == alone
    assert stage.started == 4 and fleet.seats[1].generation is None


def test_engines_that_never_start_end_the_run_with_their_last_words(tmp_path):
    """Before there is a journal, so that there is nothing to go on with."""
    why = "\x1b[36mray::EngineActor()\x1b[39m (pid=1)\nTraceback\nImportError: \x1b[1mwhy\n"
    with pytest.raises(StateError) as error:
        fleet = fleet_on(Stage(risk=1.0), tmp_path, 1)
        fleet._last_words = last_line(RuntimeError(why))
        fleet.ready()
    assert "no engine is left after 0 generations" in str(error.value)
    assert "the last with: ImportError: why; mend that and start again." in str(error.value)
    assert last_line(RuntimeError()) == "RuntimeError"


def test_no_engine_left_is_an_error_and_the_journal_is_whole(tmp_path, alone):
    stage = Stage()
    fleet = fleet_on(stage, tmp_path, 2)
    generate = fleet.members

    def members(generation, *rest):
        stage.risk = float(generation == 3)
        for seat in fleet.seats:
            seat.actor.risk = stage.risk
        return generate(generation, *rest)

    fleet.members = members
    with pytest.raises(StateError, match=r"no engine is left after 3 generations.*--resume"):
        train(tmp_path, fleet)
    assert train(tmp_path, fleet_on(Stage(), tmp_path, 1), resume=True) == alone


def test_an_engine_apart_is_named(tmp_path):
    fleet = fleet_on(Stage(), tmp_path, 3)
    weights = fleet.live_weights()
    checksum = weights.checksum()
    fleet.seats[1].actor.held._held.engine.weights[2] += 1
    with pytest.raises(StateError, match=rf"engine 1 has .* engine 0 has {checksum} \(1 of 3"):
        weights.checksum()


def test_a_death_without_a_journal_is_an_error():
    fleet = RayFleet(Stage(), MAKING, 1, None, note=lambda text: None)
    weights = fleet.live_weights()
    weights.update([], [])
    fleet.seats[0].actor.dead = True
    with pytest.raises(StateError, match="no journal to start it again from"):
        weights.checksum()


def test_completions_cross_whole():
    one = Completion("é\n\x00", 3, True, (1, 2, 3), 7)
    assert completion_of(completion_record(one)) == one


def test_a_wait_is_shared_out_by_what_was_done_meanwhile(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("esfast.measure.time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = Clock()
    now[0] = 8.0
    assert clock.share({PERTURB: 1.0, GENERATION: 3.0}) == 8.0
    assert clock.seconds[PERTURB] == 2.0 and clock.seconds[GENERATION] == 6.0
    now[0] = 9.0
    clock.share({PERTURB: 0.0, GENERATION: 0.0})
    clock.lap(SCORING)
    assert sum(clock.seconds.values()) == 9.0 and clock.seconds[PERTURB] == 2.5
