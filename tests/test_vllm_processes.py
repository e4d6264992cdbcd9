"""An engine is lost with its processes, whoever waits for them."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from esfast.engines.vllm_processes import LONGEST_END, Processes, engine_processes
from esfast.errors import LostError
from esfast.launch.ray_cluster import is_death

pytestmark = pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").exists() or shutil.which("bash") is None,
    reason="no /proc with children, or no bash",
)


@pytest.fixture
def core() -> Iterator[subprocess.Popen[bytes]]:
    """A process with the name of vLLM's, below another one."""
    shell = "bash -c 'exec -a VLLM::EngineCore sleep 600' & wait"
    process = subprocess.Popen(["bash", "-c", shell], start_new_session=True)
    try:
        until = time.monotonic() + 60
        while not engine_processes(os.getpid()):
            assert time.monotonic() < until
            time.sleep(0.01)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Client(SimpleNamespace):
    """What of vLLM's client of its engine core is waited for."""

    def __init__(self) -> None:
        super().__init__(resources=SimpleNamespace(engine_dead=False), outputs_queue=queue.Queue())
        self.utility_results: dict[int, Future[Any]] = {1: Future()}


def test_who_waits_for_a_process_that_is_killed_is_told(core: subprocess.Popen[bytes]) -> None:
    ((number, title),) = engine_processes(os.getpid()).items()
    assert title == "VLLM::EngineCore"
    client = Client()
    processes = Processes(client, every=0.01)
    time.sleep(0.1)
    assert processes.gone() is None and not client.resources.engine_dead
    os.kill(number, signal.SIGKILL)
    told = rf"VLLM::EngineCore \(process {number}\) .*--resume"
    with pytest.raises(LostError, match=told), processes.asked():
        client.utility_results[1].result(60)
    assert isinstance(client.outputs_queue.get(timeout=60), Exception)
    assert client.resources.engine_dead
    with pytest.raises(LostError), processes.asked():
        raise ConnectionError


def test_one_that_is_told_to_end_refuses_calls_first(core: subprocess.Popen[bytes]) -> None:
    (number,) = engine_processes(os.getpid())
    processes = Processes(Client(), every=60)
    with pytest.raises(LostError), processes.asked():
        subprocess.Popen(["sh", "-c", f"sleep 0.2; kill {number}"])
        raise Exception("Server shutting down")


def test_a_mistake_in_a_call_is_told_at_once(core: subprocess.Popen[bytes]) -> None:
    processes, begun = Processes(Client(), every=60), time.monotonic()
    with pytest.raises(ValueError, match="a"), processes.asked():
        raise ValueError("a")
    assert time.monotonic() - begun < LONGEST_END / 2
    processes.close()


@pytest.mark.filterwarnings("error")
def test_a_core_in_this_process_has_no_client_to_be_told(core: subprocess.Popen[bytes]) -> None:
    (number,) = engine_processes(os.getpid())
    within = type("InprocClient", (), {})()
    before = set(threading.enumerate())
    processes = Processes(within, every=0.01)
    (watch,) = set(threading.enumerate()) - before
    os.kill(number, signal.SIGKILL)
    watch.join(60)
    assert not watch.is_alive() and processes.gone() is not None


def test_another_error_and_another_engines_process_are_none_of_it(
    core: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esfast.engines.vllm_processes.LONGEST_END", 0.1)
    mine, client = Processes(Client(), every=0.01), Client()
    with pytest.raises(KeyError), mine.asked():
        raise KeyError("a")
    others = engine_processes(os.getpid())
    assert Processes(client, others, every=0.01)._there == {}
    mine.close()
    for number in others:
        os.kill(number, signal.SIGKILL)
    time.sleep(0.2)
    assert not client.resources.engine_dead


def test_a_child_that_ends_while_it_is_looked_at_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda path: True)  # a moment before
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert engine_processes(gone.pid) == {}


def test_what_is_raised_by_a_dead_engine_and_what_by_a_mistake() -> None:
    dead = type("EngineDeadError", (Exception,), {"__module__": "vllm.v1.engine.exceptions"})
    for error in (dead(), RuntimeError("CUDA out of memory"), ConnectionResetError()):
        assert is_death(error)
    for error in (TypeError(), ValueError(), AssertionError(), KeyError()):
        assert not is_death(error)
