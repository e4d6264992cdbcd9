"""The scheduler's side of the calls that a script makes through `collective_rpc`.

What vLLM's prefix cache holds of prompts was computed with the weights of its time. Scripts that
edit through the workers' methods do not empty it, and the workers cannot: it lies with vLLM's
scheduler, often in another process. An error of several workers can be raised there alone, too
(`esfast.engines.vllm_replies`). vLLM loads its plugins in every process of an engine, so esfast is
one (the entry point `vllm.general_plugins`): the scheduler's side of `collective_rpc` raises what
the workers reply with, and empties the cache. Without the plugin (a source tree that is not
installed) the same is done where worker and scheduler share a process.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

from esfast.engines.vllm_replies import answered

METHODS = frozenset(  # of `WorkerExtension`, by the names that scripts use
    (
        *("perturb_self_weights", "restore_self_weights", "update_weights_from_seeds"),
        *("save_self_initial_weights", "init_inter_engine_group", "broadcast_all_weights"),
        *("save_self_weights_to_disk", "load_weights_from_disk", "weights_checksum"),
    )
)
_LOADED = "ESFAST_VLLM_PLUGIN"  # inherited by the workers' processes


def register() -> None:
    """What vLLM calls in each of its processes."""
    follow_calls()
    os.environ[_LOADED] = "1"


def followed(worker: Any) -> bool:
    """Whether the scheduler of this worker does what this file says."""
    backend = worker.vllm_config.parallel_config.distributed_executor_backend
    return backend == "uni" or _LOADED in os.environ


def follow_calls() -> None:
    """Wraps the scheduler's side of `collective_rpc` in this process, once."""
    from vllm.v1.engine.core import EngineCore

    call = EngineCore.collective_rpc
    if getattr(call, "followed", False):
        return

    @functools.wraps(call)
    def collective_rpc(self: Any, method: Any, *arguments: Any, **options: Any) -> Any:
        if method not in METHODS:
            return call(self, method, *arguments, **options)
        try:
            return _values(call(self, method, *arguments, **options))
        finally:
            self.reset_prefix_cache()

    collective_rpc.followed = True  # type: ignore[attr-defined]
    EngineCore.collective_rpc = collective_rpc


def _values(replies: Sequence[Any]) -> list[Any]:
    return answered([one if isinstance(one, dict) else {"value": one} for one in replies])
