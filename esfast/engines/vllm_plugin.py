"""vLLM's prefix cache, emptied after every edit that a script makes through `collective_rpc`.

What the cache holds of prompts was computed with the weights of its time. Scripts that edit through
the workers' methods do not empty it, and the workers cannot: it lies with vLLM's scheduler, often
in another process. vLLM loads its plugins in every process of an engine, so esfast is one (the
entry point `vllm.general_plugins`): the scheduler's side of `collective_rpc` empties the cache
after a method that edits. Without the plugin (a source tree that is not installed) the same is done
where worker and scheduler share a process.
"""

from __future__ import annotations

import functools
import os
from typing import Any

EDITS = frozenset(
    (
        *("perturb_self_weights", "restore_self_weights", "update_weights_from_seeds"),
        *("broadcast_all_weights", "load_weights_from_disk"),
    )
)
_LOADED = "ESFAST_VLLM_PLUGIN"  # inherited by the workers' processes


def register() -> None:
    """What vLLM calls in each of its processes."""
    empty_after_edits()
    os.environ[_LOADED] = "1"


def empties(worker: Any) -> bool:
    """Whether the scheduler of this worker empties its prefix cache after edits, or has none."""
    config = worker.vllm_config
    together = config.parallel_config.distributed_executor_backend == "uni"
    return together or _LOADED in os.environ or not config.cache_config.enable_prefix_caching


def empty_after_edits() -> None:
    """Wraps the scheduler's side of `collective_rpc` in this process, once."""
    from vllm.v1.engine.core import EngineCore

    call = EngineCore.collective_rpc
    if getattr(call, "empties", False):
        return

    @functools.wraps(call)
    def collective_rpc(self: Any, method: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return call(self, method, *arguments, **options)
        finally:
            if method in EDITS:
                self.reset_prefix_cache()

    collective_rpc.empties = True  # type: ignore[attr-defined]
    EngineCore.collective_rpc = collective_rpc
