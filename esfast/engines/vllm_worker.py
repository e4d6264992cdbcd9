"""What esfast adds to vLLM's workers.

    LLM(..., worker_extension_cls="esfast.engines.vllm_worker.WorkerExtension")

`esfast` is what `VLLMEngine` calls: a method of the worker's `Shard` by name. The other methods
have the names and arguments of the workers of published ES scripts, which run over them unchanged
(docs/drop_in.md); what they do lies in `esfast.engines.vllm_drop_in`.

vLLM imports this file in every worker before it loads the model. Importing it makes the loaders
keep what a backend would pack away (`esfast.engines.vllm_derived`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from esfast.engines.vllm_derived import keep_weights
from esfast.engines.vllm_drop_in import DropIn
from esfast.engines.vllm_plugin import follow_calls, followed
from esfast.engines.vllm_replies import failure
from esfast.engines.vllm_shard import Shard
from esfast.errors import ConfigError, EsfastError
from esfast.members import whole
from esfast.strategy import AnchoredDecay

keep_weights()
follow_calls()

CALLS = frozenset(
    (
        *("open", "perturb", "restore", "derive", "update", "checksum", "anchor_checksum", "room"),
        *("memory_use", "reset_peak", "peak_bytes", "write_state", "check_state", "read_state"),
        *("save", "load", "group_names", "nudge", "unnudge"),
    )
)

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _script(method: _Method) -> _Method:
    """A method that scripts call. Among several workers its error is its reply, wrong arguments
    included: the scheduler's side raises it once all have replied (`esfast.engines.vllm_replies`).
    """

    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except Exception as error:
            if self.vllm_config.parallel_config.world_size == 1 or not followed(self):
                raise
            return failure(error)

    return cast(_Method, call)


class WorkerExtension:
    """Mixed into vLLM's worker class; vLLM refuses names that the worker has itself."""

    esfast_parts: dict[str, Any]

    def esfast(self, call: str, *arguments: Any) -> dict[str, Any]:
        """{"value": what `Shard`'s method returned}, or {"error": its class, "text": ...}."""
        try:
            if call not in CALLS:
                raise EsfastError(f"there is no call {call!r}; it is one of {sorted(CALLS)}.")
            return {"value": getattr(self._esfast_shard(), call)(*arguments)}
        except Exception as error:
            return failure(error)

    def _esfast_shard(self) -> Shard:
        parts = self.__dict__.setdefault("esfast_parts", {})
        if "shard" not in parts:
            parts["shard"] = Shard(self)
        return parts["shard"]

    def _esfast_drop_in(self) -> DropIn:
        parts = self.__dict__.setdefault("esfast_parts", {})
        if "drop_in" not in parts:
            parts["drop_in"] = DropIn(self._esfast_shard(), self)
        return parts["drop_in"]

    @_script
    def perturb_self_weights(self, seed: int, noise_scale: float, negate: bool = False) -> bool:
        """weights + noise_scale * noise(seed), minus where `negate`.

        Undone to the bit by `restore_self_weights` of the same seed and scale, or by the opposite
        perturbation; kept where neither follows.
        """
        self._esfast_drop_in().perturb(seed, -noise_scale if negate else noise_scale)
        return True

    @_script
    def restore_self_weights(self, seed: int, sigma: float) -> bool:
        """The bits from before `perturb_self_weights(seed, sigma)`, either sign."""
        self._esfast_drop_in().restore(seed, sigma)
        return True

    @_script
    def update_weights_from_seeds(
        self,
        seeds: Sequence[int],
        coeffs: Sequence[float],
        alpha: float,
        population_size: int,
        weight_decay_type: str = "none",
        weight_decay_lambda: float = 0.0,
    ) -> bool:
        """weights + alpha / population_size * sum_n coeffs_n noise(seed_n): one pass, rounded once.

        The last two are esfast's own: anchored decay ("l1" or "l2") in the same pass, towards the
        weights of `save_self_initial_weights`.
        """
        decay = None
        if weight_decay_type != "none":
            decay = AnchoredDecay(weight_decay_type, float(weight_decay_lambda))
        elif weight_decay_lambda != 0.0:
            raise ConfigError(
                f"weight_decay_lambda is {weight_decay_lambda!r} and pulls to nothing without a "
                "weight_decay_type, l1 or l2; give one."
            )
        if whole(population_size) is None or population_size < 1:
            raise ConfigError(
                f"population_size is {population_size!r}; expected 1 or more members."
            )
        scale = alpha / population_size
        self._esfast_drop_in().update(seeds, coeffs, scale, decay, float(alpha))
        return True

    @_script
    def save_self_initial_weights(self) -> bool:
        """Notes the weights as they are now, and keeps a copy of them in memory."""
        self._esfast_drop_in().keep_initial()
        return True

    @_script
    def init_inter_engine_group(
        self, master_address: str, master_port: int, rank: int, world_size: int
    ) -> bool:
        """Makes this engine number `rank` of `world_size` that share a run; see `DropIn.meet`."""
        self._esfast_drop_in().meet(master_address, int(master_port), rank, world_size)
        return True

    @_script
    def broadcast_all_weights(self, src_rank: int) -> bool:
        """Brings every engine to the weights of engine `src_rank`, by scalars alone, and compares
        their checksums; call it on all engines. StateError where they are apart."""
        self._esfast_drop_in().agree(src_rank)
        return True

    @_script
    def save_self_weights_to_disk(self, filepath: str) -> bool:
        """The live weights as a safetensors file of the checkpoint's tensors."""
        self._esfast_drop_in().save(filepath)
        return True

    @_script
    def load_weights_from_disk(self, filepath: str) -> bool:
        """Takes the weights of such a file, or of a Hugging Face folder."""
        self._esfast_drop_in().load(filepath)
        return True

    @_script
    def weights_checksum(self) -> str:
        """16 hex digits of this worker's weights as they are now, what is pending included."""
        return self._esfast_drop_in().checksum()
