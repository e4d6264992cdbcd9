"""Sends a run's numbers to TensorBoard or trackio, through their own packages.

Nothing is imported unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from esfast.errors import ConfigError

LOGGERS = ("tensorboard", "trackio")


class Logger(Protocol):
    """Takes named numbers a generation."""

    def log(self, generation: int, numbers: Mapping[str, float]) -> None:
        """Record `numbers` at `generation`."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class TensorBoardLogger:
    """Event files in the run folder's `tensorboard`; read them with `tensorboard --logdir`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, generation: int, numbers: Mapping[str, float]) -> None:
        """One scalar a name."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, generation)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class TrackioLogger:
    """A run of the trackio project "esfast", named after the run folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project="esfast", name=folder.name, config=dict(config))

    def log(self, generation: int, numbers: Mapping[str, float]) -> None:
        """One step."""
        self._trackio.log(dict(numbers), step=generation)

    def close(self) -> None:
        """End the run."""
        self._trackio.finish()


def require_packages(names: Sequence[str]) -> None:
    """Raises ConfigError for a name that is not there or whose package is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"cannot log to {name!r}; there are {', '.join(LOGGERS)}.")
        if find_spec(name) is None:
            raise ConfigError(
                f"--log-to {name} needs the {name} package, which is not installed; "
                f"pip install {name}, or leave the flag out."
            )


def make_loggers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Logger]:
    """A logger a name, each once. Raises ConfigError as `require_packages` does."""
    require_packages(names)
    makers: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoardLogger(folder),
        "trackio": lambda: TrackioLogger(folder, config),
    }
    return [makers[name]() for name in dict.fromkeys(names)]
