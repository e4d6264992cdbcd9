"""Fixtures of the whole suite: a `target` that runs a test on every instruction set, the emulated
CUDA kernels, a tiny model's folder, and vLLM in this process.

`target` switches the core inside the process (ESFAST_TARGET is read once, at import, and has its
own test) and gives the default back afterwards. A test that asks for it runs once a target that
this machine can execute. Tests marked `slow` run only where -m asks for them; those marked `vllm`
wherever vLLM is installed.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, and no clock: by default one that takes 200 ms fails.
settings.register_profile(
    "esfast", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("esfast")

# `python -m esfast` in a test puts the current folder first, and a clone of the sources has an
# esfast without its compiled core there. Python 3.11 and later take note of this; for 3.10,
# `away_from_the_sources` below.
os.environ.setdefault("PYTHONSAFEPATH", "1")

# Torch's waiting threads spin with the core taken that another program needs: test_engine.py took
# 69 s beside one, and takes 28 s beside two with this. esfast sets it where it is imported before
# torch (docs/engines.md).
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# A shell's background job ignores Ctrl-C, and what it starts inherits that; tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Small enough for tests, on any cores, and silent: 1 GB of key-value cache, threads not bound.
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
                    "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}  # fmt: skip
HAS_VLLM = importlib.util.find_spec("vllm") is not None
if HAS_VLLM:
    for variable, value in VLLM_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not HAS_VLLM:
        missing = pytest.mark.skip(reason="vLLM is not installed here; see CONTRIBUTING.md")
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(missing)
    if config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="slow; run with -m slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` alone spreads its files over the cores, where pytest-xdist is: 240 s become 175 on
    two. What is chosen by hand runs in one process, which starts sooner and can be debugged."""
    asked = config.option
    chosen = asked.file_or_dir or asked.keyword or asked.markexpr or asked.usepdb
    worker = hasattr(config, "workerinput")
    if worker or chosen or asked.capture == "no" or not config.pluginmanager.hasplugin("xdist"):
        return
    if asked.numprocesses is None and asked.dist == "no":
        asked.numprocesses, asked.maxprocesses, asked.dist = "logical", 4, "loadfile"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of files, but all that need the emulated CUDA kernels go to one worker, which builds them."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return super()._split_scope(nodeid).partition("test_cuda_")[0]

    return Files(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_finish() -> None:
    """What is imported by now stays, and the garbage collector need not look at it again, which
    took half of its time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def away_from_the_sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Python 3.10, which knows no PYTHONSAFEPATH, runs the tests from an empty folder."""
    if sys.version_info >= (3, 11):
        yield
        return
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("away"))
    yield
    os.chdir(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        from esfast import _core

        metafunc.parametrize("target", _core.targets(), indirect=True, scope="function")


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an instruction set, in force while the test runs."""
    from esfast import _core

    before = _core.target()
    _core.set_target(request.param)
    assert _core.target() == request.param
    yield request.param
    _core.set_target(before)


@pytest.fixture(scope="session")
def emulator_build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of the CUDA kernels for the CPU, begun."""
    from cuda_emulator import begun

    build = begun(tmp_path_factory.mktemp("cuda"))
    yield build
    for job in build.jobs.values() if build else ():
        job.kill()


@pytest.fixture(scope="session", autouse=True)
def emulator_build_begins(request: pytest.FixtureRequest) -> None:
    """Beside the first tests (15 s), if a test wants it; among workers where the first one does."""
    alone = not hasattr(request.config, "workerinput")
    items = request.session.items
    if alone and any("emulator" in getattr(item, "fixturenames", ()) for item in items):
        request.getfixturevalue("emulator_build")


@pytest.fixture(scope="session")
def emulator(emulator_build: Any) -> Any:
    """The CUDA kernels on the CPU."""
    if emulator_build is None:
        pytest.skip("no C++ compiler, or no pybind11")
    return emulator_build.module()


@pytest.fixture
def emulated(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels in the place of a device's, and every table made from now on in their care."""
    from esfast import device_table, weights

    monkeypatch.setattr(device_table, "driver", lambda: emulator.cuda)
    monkeypatch.setattr(weights, "make_table", device_table.DeviceTable)
    monkeypatch.setattr(weights, "make_records", lambda device: device_table.DeviceRecords())
    return emulator


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[None]:
    """vLLM generates in this process, on one thread; what it starts all the same it spawns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model of bytes, not trained."""
    pytest.importorskip("transformers")
    import tiny_models

    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_models.save(tiny_models.llama(), folder)
    return folder


@pytest.fixture
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file's own `place`, the current folder while a test runs."""
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def given_up_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Told how completions begin that hang: a reward process waits half a second for those, and a
    minute for the others and for its end, which a machine that stalls may need."""
    from esfast.tasks import reward_pool

    ask = reward_pool.RewardProcess.ask
    monkeypatch.setattr(reward_pool, "LAST_SECONDS", 60.0)

    def make(begin: str) -> None:
        def waited(process: Any, question: Mapping[str, Any]) -> dict[str, Any]:
            process._timeout = 0.5 if question["completion"].startswith(begin) else 60.0
            return ask(process, question)

        monkeypatch.setattr(reward_pool.RewardProcess, "ask", waited)

    return make


@pytest.fixture
def the_usual_handlers() -> Iterator[None]:
    """Ctrl-C and SIGTERM as a process finds them at its start; ray.init leaves its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGTERM, ended)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of a report's words and numbers: drawing takes most of its time."""
    from esfast.html_report import drawing, pictures

    nothing = drawing.Drawn(b"<svg/>", b"<svg/>", b"")
    monkeypatch.setattr(pictures, "drawn", lambda *_: nothing)
