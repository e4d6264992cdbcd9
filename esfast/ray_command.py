"""`esfast train --launcher ray`: from the flags to engines in actors, on both sides of the wire."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esfast.errors import ConfigError
from esfast.launch.ray import Making, RayFleet
from esfast.launch.ray_actor import Hosted
from esfast.launch.ray_cluster import Cluster, Share
from esfast.launch.torchrun import under_torchrun
from esfast.opening import Opened, open_engine
from esfast.train_flags import strategy_of

EXECUTOR = "distributed_executor_backend"
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
    engines = args.engines or 1
    cluster = Cluster()
    try:
        share = _share(args, cluster, engines)
        making = Making("esfast.ray_command:hosted", _arguments(args, share), share)
        fleet = RayFleet(cluster, making, engines, journal)
    except BaseException:
        cluster.close()
        raise
    return Opened(fleet, None, fleet.save, making.arguments["device"])


def _share(args: argparse.Namespace, cluster: Cluster, engines: int) -> Share:
    """All cores of the cluster between the engines, or --threads for each worker; vLLM takes a GPU
    a worker where the cluster has any, another engine where --device says so."""
    vllm = args.engine == "vllm"
    workers = args.tensor_parallel_size if vllm else 1
    if (vllm and cluster.has("GPU")) or args.device.startswith("cuda"):
        return Share(args.threads or 1, workers)
    threads = args.threads or max(int(cluster.has("CPU")) // (engines * workers), 1)
    # vLLM would bind every engine of a machine to the same cores, counted from 0.
    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    environment = {"VLLM_CPU_OMP_THREADS_BIND": bound, "OMP_NUM_THREADS": str(threads)}
    return Share(threads * workers, environment=environment)


def _arguments(args: argparse.Namespace, share: Share) -> dict[str, Any]:
    """The flags as an actor is sent them: folders by their whole path, for it has another current
    folder; its threads; and vLLM's workers inside the actor, which are not Ray's to place."""
    plain = ((name, value) for name, value in vars(args).items() if isinstance(value, PLAIN))
    sent: dict[str, Any] = dict(plain)
    for name in ("model", "anchor_model"):
        if sent[name] is not None and Path(sent[name]).exists():
            sent[name] = str(Path(sent[name]).absolute())
    if share.gpus:
        sent["device"] = "cuda"  # an actor sees no other GPUs than its own
    else:
        sent["threads"] = int(share.environment["OMP_NUM_THREADS"])
    chosen = any(text.startswith(f"{EXECUTOR}=") for text in args.engine_option)
    if args.engine == "vllm" and not chosen:
        executor = "uni" if args.tensor_parallel_size == 1 else "mp"
        sent["engine_option"] = [*args.engine_option, f"{EXECUTOR}={executor}"]
    return sent


def hosted(arguments: Mapping[str, Any]) -> Hosted:
    """What an actor of this run holds; called there."""
    args = argparse.Namespace(**arguments)
    opened = open_engine(args)
    return Hosted(opened.engine, strategy_of(args), opened.anchor, opened.save)
