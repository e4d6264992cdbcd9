"""The Ray cluster of a run: the one that is there (RAY_ADDRESS, or the last that was started on
this machine), else a local one for as long as the run takes. What cannot be is refused by name
before an actor starts.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from esfast.errors import ConfigError, first_line


@dataclass(frozen=True)
class Share:
    """What one engine takes: CPU cores and GPUs; environment: variables of its process."""

    cpus: int
    gpus: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)


class Cluster:
    """A connection to Ray; closed with the run where the run made it."""

    def __init__(self) -> None:
        """Raises ConfigError where Ray is not installed or its cluster does not answer."""
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a local cluster of 2.60 has no token
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self.ray = _ray()
        self._own = not self.ray.is_initialized()
        if self._own:
            options = {"include_dashboard": False} if "RAY_ADDRESS" not in os.environ else {}
            try:
                with _own_sigterm():
                    self.ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
                raise ConfigError(
                    f"no Ray cluster: {first_line(error)}. Start one with ray start --head, set "
                    "RAY_ADDRESS to one that runs, or unset it for a local one."
                ) from None

    def require(self, engines: int, share: Share) -> None:
        """Raises ConfigError where the whole cluster has less than so many engines take."""
        for resource, each in (("CPU", share.cpus), ("GPU", share.gpus)):
            has, needed = self.has(resource), engines * each
            if needed > has:
                raise ConfigError(
                    f"{engines} engines of {each} {resource} each need {needed}, and the Ray "
                    f"cluster has {has:g}. Lower --engines"
                    f"{' or --threads' if resource == 'CPU' else ''}, or add nodes to the cluster."
                )

    def has(self, resource: str) -> float:
        """How much of "CPU" or "GPU" the whole cluster has."""
        return float(self.ray.cluster_resources().get(resource, 0.0))

    def actor(self, kind: type, share: Share) -> Any:
        """A new actor; it is scheduled where its share is free, and never restarted by Ray."""
        options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_restarts": 0}
        return self.ray.remote(**options)(kind).remote()

    def close(self) -> None:
        """Leaves the cluster, and ends it where it was this run's own."""
        if self._own and self.ray.is_initialized():
            self.ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """ray.init puts a handler of its own, which exits, in the place of what SIGTERM does here."""
    before, ended = signal.getsignal(signal.SIGTERM), False
    try:
        yield
    except SystemExit as error:
        ended = callable(before) and error.code == signal.SIGTERM
        if not ended:
            raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    if ended:
        signal.raise_signal(signal.SIGTERM)


def _ray() -> Any:
    try:
        import ray

        if ray.__file__ is None:  # a folder named ray on the path, which hides that it is missing
            raise ImportError(f"'ray' is the folder {next(iter(ray.__path__))}")
    except ImportError as error:
        raise ConfigError(
            f"--launcher ray needs the ray package ({error}); pip install ray, or leave the flag "
            "out: torchrun shares a run between processes as well."
        ) from None
    return ray


def last_line(error: Exception) -> str:
    """What an actor died of: Ray tells of the actor first, and ends with the reason."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
    return text.splitlines()[-1].strip()[:300]


def is_death(error: BaseException) -> bool:
    """Whether what an actor raised is its engine's end: a backend that lost a process, a device
    without memory, a broken connection. A mistake in a call would only be made again."""
    backend = type(error).__module__.partition(".")[0]
    return isinstance(error, RuntimeError | OSError) or backend in ("vllm", "zmq")
