"""Sends a run's numbers to TensorBoard or trackio, through their own packages.

Nothing is imported unless it is asked for, and nothing is opened before the first numbers, whose
generation says whether they begin a run (0) or go on with one.
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
        """End; there may have been no numbers."""
        ...


class TensorBoardLogger:
    """Event files in the run folder's `tensorboard`; read them with `tensorboard --logdir`.

    What an earlier part of the run logged from the first generation on (of `esfast grpo`, which
    goes on from a checkpoint) is not shown any more.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer: Any = None

    def log(self, generation: int, numbers: Mapping[str, float]) -> None:
        """One scalar a name, in the file when this returns: a process may be killed."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=generation)
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, generation)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class TrackioLogger:
    """A run of the trackio project "esfast", named after the run folder; with `--resume` the same.

    Generations that `esfast grpo` repeats from its checkpoint are there twice.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._name, self._config = folder.name, dict(config)
        self._trackio: Any = None

    def log(self, generation: int, numbers: Mapping[str, float]) -> None:
        """One step."""
        if self._trackio is None:
            import trackio

            self._trackio = trackio
            resume = "allow" if generation else "never"
            trackio.init(project="esfast", name=self._name, config=self._config, resume=resume)
        self._trackio.log(dict(numbers), step=generation)

    def close(self) -> None:
        """End the run."""
        if self._trackio is not None:
            self._trackio.finish()


def still_logging(
    loggers: Sequence[Logger], act: Callable[[Logger], None], tell: Callable[[str], object]
) -> list[Logger]:
    """Those that could do it. One that raises is told of and used no more: what it shows is in
    the run's own files too, and no run ends for it."""
    kept = []
    for logger in loggers:
        try:
            act(logger)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            tell(f"{type(logger).__name__} failed and gets no more numbers ({why})")
        else:
            kept.append(logger)
    return kept


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
