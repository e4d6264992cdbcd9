"""Workers that share a run: the same bits whatever their number, and scalars alone between them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from test_resume import flags, tiny_model, weights  # noqa: F401  (fixtures)

from esfast.journal import read_journal
from esfast.launch.torchrun import join_workers, under_torchrun
from esfast.launch.workers import Alone

pytest.importorskip("torch.distributed")
SCENARIOS = (
    "1:8",
    "2:8",
    "3:8",
    "2:8:kill",
    "1:8:resume",
    "2:8:slow",
    "2:8:busy",
    "2:8000",
    "2:8:apart",
)
KILL = """    import os
    if os.environ["RANK"] == "1" and os.path.exists("died/metrics.jsonl"):
        os.kill(os.getppid(), 9)
"""


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory) -> dict[str, list[dict]]:
    driver = Path(__file__).with_name("workers_driver.py")
    command = [sys.executable, str(driver), str(tmp_path_factory.mktemp("workers"))]
    command += SCENARIOS
    paths = os.pathsep.join(filter(None, [str(driver.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    told = dict(zip(SCENARIOS, json.loads(done.stdout), strict=True))
    assert not [worker for all_of in told.values() for worker in all_of if "bug" in worker], told
    return told


def test_the_number_of_workers_does_not_show_in_the_weights(scenarios):
    (alone,) = scenarios["1:8"]
    for name in ("2:8", "3:8", "2:8:slow"):
        assert {worker["checksum"] for worker in scenarios[name]} == {alone["checksum"]}, name
        assert scenarios[name][0]["failed"] == alone["failed"] == 5 * 8


def test_every_member_is_evaluated_once(scenarios):
    """Held-out and warm-up calls are the leader's: 5 of 45."""
    for name in ("1:8", "2:8", "3:8", "2:8:slow", "2:8000"):
        assert sum(worker["asked"] for worker in scenarios[name]) == 5 * 8 + 5, name


def test_the_number_of_workers_does_not_show_in_the_account(scenarios):
    """Nor where the leader took no member; and every failed score has a reason."""
    (alone,) = scenarios["1:8"]
    assert alone["cost"]["training"]["prompt"] == 5 * 8 * 8 * 3
    assert scenarios["2:8:busy"][0]["asked"] == 5
    for name in ("2:8", "3:8", "2:8:slow", "2:8:busy"):
        leader = scenarios[name][0]
        assert (leader["cost"], leader["reasons"]) == (alone["cost"], alone["reasons"]), name
        assert 0 < leader["fastest"] < 1e8


def test_no_bit_is_lost_on_the_way(scenarios):
    for name in ("1:8", "2:8", "3:8"):
        count = len(scenarios[name])
        rows = np.array([[-0.0, np.nan, 0.1 + rank, 5e-324] for rank in range(count)])
        assert {worker["bits"] for worker in scenarios[name]} == {rows.tobytes().hex()}


def test_a_slow_worker_takes_fewer(scenarios):
    """Held-out and warm-up calls of the leader's aside, 7 members of 8."""
    fast, slow = scenarios["2:8:slow"]
    assert (fast["asked"] - 5, slow["asked"]) == (5 * 7, 5 * 1)


def test_a_dead_worker_ends_the_run_and_another_number_goes_on(scenarios):
    left, killed = scenarios["2:8:kill"]
    assert killed == {} and "Another worker died" in left["error"]
    assert "--resume" in left["error"] and len(left["error"].splitlines()) == 1
    (resumed,), (alone,) = scenarios["1:8:resume"], scenarios["1:8"]
    assert resumed["checksum"] == alone["checksum"] and resumed["asked"] < alone["asked"]


def test_bytes_do_not_depend_on_the_model(scenarios):
    """A model a thousand times as large: a few digits of its shape in the journal's header."""
    small, large = (sum(w["sent"] for w in scenarios[name]) for name in ("2:8", "2:8000"))
    assert abs(small - large) < 32 and small < 5500


def test_weights_that_are_apart_stop_the_run_by_name(scenarios):
    for worker in scenarios["2:8:apart"]:
        assert "after 2 generations worker 1 has weights" in worker["error"]


def test_one_process_needs_no_messages(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not under_torchrun()
    workers = join_workers()
    assert isinstance(workers, Alone) and list(workers.deal(3, 4)) == [0, 1, 2, 3]
    rows = np.array([[0.1, -0.0], [np.nan, 2.0]])
    assert workers.gather(rows) is rows and workers.share(b"x") == b"x"


JOIN = """import signal
signal.signal(signal.SIGTERM, signal.default_int_handler)
from esfast.launch.torchrun import join_workers
join_workers()
"""


def test_sigterm_ends_a_worker_that_waits_for_the_others():
    """Torch waits in C++, where a handler of Python's would run when all are there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        there = free.getsockname()
    place = {"MASTER_ADDR": there[0], "MASTER_PORT": str(there[1])}
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", **place}
    worker = subprocess.Popen([sys.executable, "-c", JOIN], env=environment)
    try:
        while worker.poll() is None:
            with suppress(OSError):
                socket.create_connection(there).close()
                break
            time.sleep(0.05)
        worker.terminate()
        assert worker.wait(60) == -signal.SIGTERM
    finally:
        worker.kill()


@pytest.mark.slow
def test_torchrun_gives_the_model_of_one_process(flags, tmp_path):  # noqa: F811
    """The real thing: 1, 2 and 3 workers, and 2 of which one is killed, resumed with 1."""
    flags = [*flags, "--generations", "4"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

    def train(count: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [*launch, str(count), "-m", "esfast", *arguments]
        return subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
        )

    assert subprocess.run([sys.executable, "-m", "esfast", *flags, "--output", "0"]).returncode == 0
    for count in (1, 2, 3):
        done = train(count, *flags, "--output", str(count))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("held-out score") == 1
        assert weights(f"{count}/model") == weights("0/model")
    rewards = tmp_path / "rewards.py"
    harmless = rewards.read_text()
    rewards.write_text(harmless.replace("    return", f"{KILL}    return"))
    done = train(2, *flags, "--output", "died")
    assert done.returncode != 0 and "go on with esfast train --resume" in done.stderr
    assert 1 <= len(read_journal("died").generations) < 4
    rewards.write_text(harmless)
    done = subprocess.run([sys.executable, "-m", "esfast", "train", "--resume", "died"])
    assert done.returncode == 0 and weights("died/model") == weights("0/model")
