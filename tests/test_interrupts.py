"""SIGTERM does what Ctrl-C does, at the moments at which Ctrl-C does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from esfast import cli
from esfast.interrupts import Interrupts, ended_as_interrupted, not_swallowed
from esfast.launch.ray_cluster import _own_sigterm

pytestmark = pytest.mark.usefixtures("the_usual_handlers")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_interrupts() -> None:
    with pytest.raises(KeyboardInterrupt), ended_as_interrupted():
        terminate()


def test_it_waits_until_the_weights_rest() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), ended_as_interrupted(), Interrupts(moving=True) as held:
        terminate()
        done.append("moved")
        held.rest()
        done.append("more")
    assert done == ["moved"]


def test_a_library_that_catches_it_does_not_stop_it() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), ended_as_interrupted(), not_swallowed():
        with suppress(Exception, KeyboardInterrupt):
            terminate()
        done.append("went on")
    assert done == [] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_strikes_in_a_destructor_comes_after_it() -> None:
    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), not_swallowed():
        Dying()


def test_one_that_waits_for_the_weights_still_does() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Interrupts(moving=True) as held:
        with not_swallowed():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("moved")
        held.rest()
    assert done == ["moved"]


def test_one_that_ends_the_start_of_ray_interrupts() -> None:
    with pytest.raises(KeyboardInterrupt), ended_as_interrupted(), _own_sigterm():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as ray.init does
        terminate()
    with pytest.raises(SystemExit), _own_sigterm():
        sys.exit(signal.SIGTERM)  # where SIGTERM would kill


def test_a_command_that_is_terminated_is_an_interrupted_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("esfast.train_command.run_train", lambda args: terminate())
    assert cli.main(["train"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_handler_of_somebody_elses_stays() -> None:
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with ended_as_interrupted():
            terminate()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seen == [signal.SIGTERM]


@pytest.mark.parametrize("times", [1, 2])
def test_the_second_one_and_one_where_ctrl_c_is_ignored_kill(times: int) -> None:
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)" if times == 1 else "pass"
    code = f"""
import os, signal
from esfast.interrupts import ended_as_interrupted
{ignored}
with ended_as_interrupted():
    for _ in range({times}):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            pass
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")
