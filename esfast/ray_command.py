"""`esfast train --launcher ray`: from the flags to engines in actors, on both sides of the wire."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esfast.errors import ConfigError
from esfast.launch.torchrun import under_torchrun
from esfast.opening import Opened, open_engine
from esfast.train_flags import strategy_of

if TYPE_CHECKING:
    from esfast.launch.ray_actor import Hosted

PLAIN = (str, int, float, bool, type(None), list)  # what of the flags an actor may be sent


def require_launcher(args: argparse.Namespace) -> None:
    """ConfigError for flags that do not go together."""
    if args.launcher != "ray":
        if args.engines is not None:
            raise ConfigError("--engines goes with --launcher ray.")
    elif under_torchrun():
        raise ConfigError(
            "--launcher ray starts its engines itself: run esfast train without torchrun, or leave "
            "the flag out."
        )


def open_fleet(args: argparse.Namespace, journal: Path) -> Opened:
    """The engines of a run, each with the model loaded; none is in this process.

    journal: where the run's is, or will be. ConfigError where Ray is not there or has too little.
    """
    from esfast.launch.ray import Making, RayFleet
    from esfast.launch.ray_cluster import Cluster, Share

    engines = args.engines or 1
    cluster = Cluster()
    try:
        threads = args.threads or max(cluster.cores() // engines, 1)
        sent = {**vars(args), "threads": threads, "model": _absolute(args.model)}
        arguments = {name: value for name, value in sent.items() if isinstance(value, PLAIN)}
        share = Share(threads, gpus=1 if args.device.startswith("cuda") else 0)
        making = Making("esfast.ray_command:hosted", arguments, share)
        fleet = RayFleet(cluster, making, engines, journal)
    except BaseException:
        cluster.close()
        raise
    return Opened(fleet, None, fleet.save)


def _absolute(model: str) -> str:
    """A folder by its whole path: an actor has another current folder."""
    return str(Path(model).absolute()) if Path(model).exists() else model


def hosted(arguments: Mapping[str, Any]) -> Hosted:
    """What an actor of this run holds; called there."""
    from esfast.launch.ray_actor import Hosted

    args = argparse.Namespace(**arguments)
    opened = open_engine(args)
    return Hosted(opened.engine, strategy_of(args), opened.anchor, opened.save)
