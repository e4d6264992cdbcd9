"""An actor ends with its engine's processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esfast.launch.ray_cluster import is_death
from esfast.launch.watch import engine_processes, watch

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


def test_the_death_of_an_engines_process_is_told(core: subprocess.Popen[bytes]) -> None:
    ((number, title),) = engine_processes(os.getpid()).items()
    assert title == "VLLM::EngineCore"
    told, done = [], threading.Event()
    thread = watch(0.01, lambda why: (told.append(why), done.set()))
    assert thread is not None and not done.wait(0.2)
    os.kill(number, 9)
    assert done.wait(60) and told == [f"VLLM::EngineCore (process {number}) is gone"]
    thread.join(60)


def test_an_engine_without_processes_is_not_watched() -> None:
    assert watch() is None


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
