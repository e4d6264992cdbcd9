"""Scorings in flight: what a scoring function does wrong costs its completion alone, in any order
of completion; and generation does not wait for them."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import pytest
from number_engine import NumberEngine

from esfast import ConfigError, EvolutionStrategy, ParameterTable, StrategyConfig
from esfast.engines.base import Sampling
from esfast.measure import GENERATION, SCORING, Clock
from esfast.rollout import Rollout, TrainConfig
from esfast.tasks import Example, Task, make_task
from esfast.tasks.reward_pool import Limits, RewardFailure, _forward

REWARDS = '''
import ctypes, os, signal, subprocess, sys, time

kept = []

def eat():
    while True:
        kept.append(bytearray(16 << 20))

def moody(example, completion):
    act, _, rest = completion.partition(" ")
    if act == "raise": raise KeyError("no")
    if act == "hang":
        if rest: open(rest, "w").close()
        time.sleep(600)
    if act == "hang-alarm-off":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(600)
    if act == "eat": eat()
    if act == "eat-caught":
        try: eat()
        except MemoryError: kept.clear()
    if act == "exit": os._exit(7)
    if act == "crash": ctypes.string_at(0)
    if act == "leave-child": subprocess.Popen([sys.executable, "-c", CHILD, rest])
    if act == "print":
        print('{"id": 1, "value": 99.0}', flush=True)
        os.write(1, b"\\\\xff\\\\x00 no text")
    if act == "forge":
        for fd in range(3, 40):
            try: os.write(fd, rest.encode() + b"\\\\n")
            except OSError: pass
    if act == "flood":
        for fd in range(3, 40):
            try: os.write(fd, b"x" * 300_000)
            except OSError: pass
    if act == "close":
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        os.closerange(0, 256)
        time.sleep(600)
    if act == "leave-fork" and os.fork() == 0:
        os.setsid()
        if os.fork() == 0: time.sleep(30)
        os._exit(0)
    if act == "read": return 0.5 if sys.stdin.read() == "" else -9.0
    if act == "slow": time.sleep(float(rest))
    if act == "fork": return float(os.getpid())
    return 1.0

CHILD = (
    "import os, pathlib, sys, time\\n"
    "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
)
'''.replace("\\\\", "\\")  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    (tmp_path / "moods.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(json.dumps({"prompt": f"say {n}"}) for n in range(10))
    (tmp_path / "prompts.jsonl").write_text(rows)
    return tmp_path


def custom(request: pytest.FixtureRequest, **options) -> Task:
    settings = {"reward": "moods:moody", "data": "prompts.jsonl", "failure_reward": -1.0}
    task = make_task("custom", **{**settings, "timeout": 60.0, "memory": 0.25, **options})
    request.addfinalizer(task.close)
    return task


BAD = {
    "raise": "KeyError",
    "hang": "no answer within 0.5 s",
    "hang-alarm-off": "no answer within 0.5 s",
    "eat": "ran out of memory (its limit is 0.268 GB, --reward-memory)",
    "exit": "ended with code 7",
    "crash": "ended by SIGSEGV",
    'forge {"value": 99.0}': "no reply",
    'forge {"id": 77, "value": 99.0}': "no reply",
    "forge not JSON": "no reply",
    "forge [1]": "no reply",
    "flood": "no reply",
}


@pytest.mark.parametrize("workers", [1, 3])
def test_what_goes_wrong_costs_its_completion_alone(here, request, workers, given_up_on):
    given_up_on("hang")
    task = custom(request, workers=workers)
    texts = [text for bad in BAD for text in (bad, "fine", "fine")]
    scores = task.score_all(task.train_batch(0, 0, len(texts)), texts)
    assert [score.value for score in scores] == [-1.0, 1.0, 1.0] * len(BAD)
    assert [score.failed for score in scores] == [True, False, False] * len(BAD)
    for score, expected in zip(scores[::3], BAD.values(), strict=True):
        assert expected in score.feedback and len(score.feedback) <= 500


def test_a_process_that_closes_its_streams_is_replaced(here, request):
    task = custom(request)
    closed, fine = task.score_all(task.train_batch(0, 0, 2), ["close", "fine"])
    assert closed.failed and "ended its replies, and goes on" in closed.feedback
    assert fine.value == 1.0


def test_what_is_allowed_stays_allowed(here, request):
    """Printing, reading an empty standard input, a MemoryError that the function mends itself."""
    task = custom(request)
    texts = ["print", "read", "eat-caught", "fine"]
    scores = task.score_all(task.train_batch(0, 0, 4), texts)
    assert [score.value for score in scores] == [1.0, 0.5, 1.0, 1.0]


def test_a_process_that_ran_out_of_memory_is_replaced(here, request):
    """It holds what it took: the next completion would fail as well."""
    task = custom(request)
    examples = task.train_batch(0, 0, 4)
    values = [s.value for s in task.score_all(examples, ["fork", "fork", "eat", "fork"])]
    assert values[0] == values[1] and values[2] == -1.0 and values[3] not in (values[0], -1.0)


def test_no_limit_and_a_limit_too_small_to_load(here, request):
    (here / "heavy.py").write_text("held = bytearray(300 << 20)\ndef f(example, text): return 1")
    with pytest.raises(ConfigError, match=r"heavy:f.*MemoryError"):
        custom(request, reward="heavy:f")
    assert custom(request, reward="heavy:f", memory=0).score_all([Example("1", "p", {"row": {}})],
                                                                [""])[0].value == 1.0  # fmt: skip
    for wrong in ({"memory": -1}, {"timeout": 0}, {"workers": 0}):
        with pytest.raises(ConfigError, match=r"reward (memory|timeout|workers) is"):
            custom(request, **wrong)


def test_a_machine_without_room_for_a_process(here, request, monkeypatch):
    """`ulimit -u`, pids.max of a container, `ulimit -n`."""

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    task = custom(request)
    with monkeypatch.context() as full:
        full.setattr("subprocess.Popen", refuse)
        with pytest.raises(ConfigError, match="no process can be started"):
            custom(request)
        task.pool._processes[0]._end()
        (score,) = task.score_all(task.train_batch(0, 0, 1), ["fine"])
        assert score.failed and "no process can be started" in score.feedback
    assert [score.value for score in task.score_all(task.train_batch(0, 0, 1), ["fine"])] == [1.0]


def test_limits_of_all_processes_together_leave_room(monkeypatch):
    monkeypatch.setattr("esfast.tasks.reward_pool.available_memory", lambda: 64 << 30)
    assert Limits(workers=2).bytes_each() == 8 << 30
    assert Limits(workers=64).bytes_each() == 1 << 30
    assert Limits(workers=64, memory=0).bytes_each() == 0


def test_scores_belong_to_their_completions_whatever_the_order(here, request):
    task = custom(request, workers=3)
    texts = ["slow 0.6", "raise", "fine", "slow 0.3", "exit", "fine", "raise"]
    values = [s.value for s in task.score_all(task.train_batch(0, 0, len(texts)), texts)]
    assert values == [1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def wait_for(path: Path, text: bool = False, or_dead: int = 0) -> None:
    end = time.monotonic() + 60
    while not path.exists() or (text and not path.read_text()):
        if or_dead and not alive(or_dead):
            return
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_process_takes_its_children_along(here, request, given_up_on):
    given_up_on("hang")
    task = custom(request)
    example = task.train_batch(0, 0, 1)[0]
    assert task.safe_score(example, "leave-child pid").value == 1.0
    wait_for(Path("pid"), text=True)
    child = int(Path("pid").read_text())
    assert alive(child)
    assert task.safe_score(example, "hang").failed
    assert gone(child, 60)


def test_a_fork_that_left_does_not_hold_the_run(here, request, given_up_on):
    """It has the process's pipes, and is not killed with it."""
    given_up_on("hang")
    task = custom(request)
    example = task.train_batch(0, 0, 1)[0]
    assert task.safe_score(example, "leave-fork").value == 1.0
    reader = next(t for t in threading.enumerate() if getattr(t, "_target", None) is _forward)
    assert task.safe_score(example, "hang").failed and reader.is_alive()


def test_closing_ends_what_is_in_flight(here, request):
    task = custom(request, timeout=600.0)
    pending = task.score_later(task.train_batch(0, 0, 2), ["hang here", "fine"])
    wait_for(here / "here")
    task.close()
    with pytest.raises(CancelledError):
        pending()
    with pytest.raises(RewardFailure, match="the run is over"):
        task.pool.call({}, "fine")


def test_closing_while_a_process_starts_ends_it(here, request, monkeypatch):
    task, popen, started = custom(request), subprocess.Popen, []
    task.pool._processes[0]._end()

    def closing(*arguments: object, **options: object) -> subprocess.Popen:
        started.append(popen(*arguments, **options))
        task.close()
        return started[0]

    monkeypatch.setattr("subprocess.Popen", closing)
    with pytest.raises(RewardFailure, match="the run is over"):
        task.pool.call({}, "fine")
    assert started[0].returncode == -signal.SIGKILL


def test_a_time_limit_is_said_whichever_side_kept_it(here, request):
    """Its own alarm is first where this process is kept from its cores."""
    task = custom(request, timeout=0.1)
    task.pool._processes[0]._timeout = 60.0
    with pytest.raises(RewardFailure, match=r"no answer within .*SIGALRM$"):
        task.pool.call({}, "hang")


def test_a_hanging_function_does_not_outlive_a_killed_run(here):
    script = (
        "import sys, threading, time\n"
        "from esfast.tasks.reward_pool import Limits, RewardPool\n"
        "pool = RewardPool('moods:moody', Limits(timeout=0.2, memory=0))\n"
        "pool._processes[0].start()\n"
        "print(pool._processes[0]._process.pid, flush=True)\n"
        "pool._processes[0]._timeout = 600\n"
        "pool.call({}, 'hang here')\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        reward = int(run.stdout.readline())
        wait_for(here / "here", or_dead=reward)  # now its own alarm alone ends it, or did
        os.kill(run.pid, signal.SIGKILL)
    assert gone(reward, 60)


# --- generation goes on while the scores are on their way ---------------------------------------


class Later(Task):
    """Scores nothing until it is asked for; notes what was in flight."""

    def __init__(self):
        self.open = self.most = 0

    def train_batch(self, seed, generation, count):
        return [Example(str(n), str(n)) for n in range(count)]

    def held_out(self, count):
        return []

    def score(self, example, completion):
        raise AssertionError("score_later is what is called")

    def score_later(self, examples, completions):
        self.open += 1
        self.most = max(self.most, self.open)

        def wait():
            self.open -= 1
            return [self.failure("x") if c == "0" else type(self.failure(""))(float(c)) for c in
                    completions]  # fmt: skip

        return wait


def population(engine, task, clock=None):
    config = TrainConfig(
        StrategyConfig(sigma=0.1, alpha=0.1, population_size=6), Sampling(4), prompts=4
    )
    es = EvolutionStrategy(
        ParameterTable.from_tensors({"w": engine.weights}), config.strategy, threads=1
    )
    return Rollout(engine, task, config, clock or Clock()).population(es)


def test_members_are_scored_while_the_next_generate():
    later = Later()
    first = population(NumberEngine(), later)
    assert later.most == 6 and later.open == 0

    class Now(Later):
        def score_later(self, examples, completions):
            scores = super().score_later(examples, completions)()
            return lambda: scores

    assert (population(NumberEngine(), Now()).rewards == first.rewards).all()


def test_only_the_wait_for_scores_counts_as_scoring(monkeypatch):
    """Generating takes 2 s a member, scoring 3 s beside it: the last member's are waited for."""
    now = [100.0]
    monkeypatch.setattr("esfast.measure.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Timed(Later):
        def score_later(self, examples, completions):
            due = now[0] + 3.0
            wait = super().score_later(examples, completions)

            def until_due():
                now[0] = max(now[0], due)
                return wait()

            return until_due

    def takes(seconds):
        now[0] += seconds

    clock = Clock()
    population(NumberEngine(lambda call: takes(2.0)), Timed(), clock)
    assert clock.seconds[GENERATION] == 6 * 2.0 and clock.seconds[SCORING] == 3.0
    assert sum(clock.seconds.values()) == now[0] - 100.0 == 15.0
