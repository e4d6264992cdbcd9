"""TransformersEngine: text from a Hugging Face model held in this process, on a CPU or a GPU.

An own decoding loop over the model's forward: logits of the last position only, a cache sized
once, the prompts' common beginning computed once a call, attention for short rows on CPUs, and rows
that have ended leave the batch once half of it has. Tokenisation and batches are kept for the
prompt lists used last, since all members of a generation answer the same one.

The model is only ever edited through `live_weights`; nothing derived from its weights
outlives a call, so `weights_changed` has nothing to do. Not promised: the tokens of
`model.generate` in bfloat16, where sums taken in another order choose otherwise among nearly equal
logits (in fp32 they agree).
"""

from __future__ import annotations

import inspect
import os
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esfast.engines import prompts as prompting
from esfast.engines.attention import short_row_attention
from esfast.engines.base import Completion, Prompt, Sampling
from esfast.engines.decoding import Decoder, Ends
from esfast.engines.kv_cache import can_share
from esfast.engines.products import wide_products
from esfast.errors import ConfigError, EsfastError, StateError, first_line
from esfast.parameters import ParameterTable
from esfast.weights import Weights, weights_of

ROWS = 64  # decoded together, where nobody says


class TransformersEngine:
    """Batched greedy and sampled generation; see `esfast.engines.base.Engine` for the contract.

    `model`: a causal language model; `tokenizer`: its tokenizer. `batch_size`: the most rows
    decoded together, 64 if None. `system_prompt`: put before conversations that have none. `chat`:
    whether prompts go through the chat template; by default where the tokenizer has one.
    `share_prefix`: whether the prompts' common first tokens are computed once. Raises ConfigError
    for a model or setting that this engine cannot work with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | None = None,
        system_prompt: str | None = None,
        chat: bool | None = None,
        share_prefix: bool = True,
    ) -> None:
        batch_size = ROWS if batch_size is None else batch_size
        _check(model, tokenizer, batch_size)
        _bound_compiled_products()
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.system_prompt = system_prompt
        self._chat = prompting.uses_chat(tokenizer, chat)
        self._config = model.config.get_text_config(decoder=True)
        self._share_prefix = share_prefix and can_share(model)
        self._ends = Ends.of(model, tokenizer)
        self._plans: OrderedDict[Hashable, prompting.Plan] = OrderedDict()
        self._table: ParameterTable | None = None
        self._closed = False

    def table(self) -> ParameterTable:
        """The model's live parameters; the same table at every call."""
        if self._table is None:
            self._table = ParameterTable.from_module(self.model)
        return self._table

    def live_weights(
        self, memory: str = "lean", anchor: Path | bool = False, threads: int | None = None
    ) -> Weights:
        """`esfast.Weights` over the model's parameters."""
        return weights_of(self.table(), memory, anchor, threads)

    def weights_changed(self) -> None:
        """Nothing to derive again: every call computes from the weights as they are."""

    def close(self) -> None:
        """Forget the prompts; the model stays with its owner."""
        self._plans.clear()
        self._closed = True

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion a prompt, in order. Raises ConfigError, DataError or StateError before
        anything is generated; EsfastError where the device's memory does not suffice."""
        if self._closed:
            raise StateError("this engine is closed; make a new TransformersEngine.")
        if len(prompts) == 0:
            return []
        plan = self._plan(prompts)
        prompting.require_length(prompts, plan.lengths, sampling.max_new_tokens, self._context())
        with self._generating():
            return Decoder(self.model, self.tokenizer, self._ends, sampling).run(plan)

    def require_room(
        self, prompts: Sequence[Prompt], max_new_tokens: int, kind: str = "prompt"
    ) -> int | None:
        """As `esfast.engines.base.Bounded` says."""
        lengths = [len(row) for row in self.token_ids(prompts)]
        return prompting.require_length(prompts, lengths, max_new_tokens, self._context(), kind)

    def _context(self) -> int | None:
        context: int | None = getattr(self._config, "max_position_embeddings", None)
        return context

    def token_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The tokens that `generate` reads for each prompt, template and special ones included.

        Raises DataError for what is no prompt.
        """
        prompting.key(prompts)
        return prompting.tokenize(prompts, self.tokenizer, self.system_prompt, self._chat)

    def _plan(self, prompts: Sequence[Prompt]) -> prompting.Plan:
        def make() -> prompting.Plan:
            rows = prompting.tokenize(prompts, self.tokenizer, self.system_prompt, self._chat)
            return prompting.make_plan(rows, self.batch_size, self._ends.pad, self._share_prefix)

        return prompting.kept(self._plans, (self.system_prompt, prompting.key(prompts)), make)

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """No autograd, no dropout, attention for short rows; the model is as before afterwards."""
        training = self.model.training
        if training:
            self.model.train(False)
        try:
            with (
                torch.inference_mode(),
                short_row_attention(self.model),
                wide_products(self.model),
                _packed_head_inputs(self.model),
            ):
                yield
        except torch.OutOfMemoryError as error:
            raise EsfastError(
                f"the memory of {self.model.device} does not hold {self.batch_size} rows at once "
                f"({first_line(error)}). Lower batch_size or max_new_tokens."
            ) from None
        finally:
            if training:
                self.model.train()


def _bound_compiled_products() -> None:
    """Let torch's two caches of compiled products (ideep's, oneDNN's) keep 32 shapes, not 1,024.

    Batches that shrink make new shapes all the time: 256 of one product of 576 x 576 in bfloat16
    left 182 MB, and 33 with this (tests/test_engine.py). A forward has about five. Read at the
    first product of a process; a value of the user's stays.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")


@contextmanager
def _packed_head_inputs(model: Any) -> Iterator[None]:
    """Hand the last hidden states to the output matrix in one piece.

    They are a strided view, and over a frozen matrix torch's linear answers that by repeating the
    matrix once a row: 3.4 GB and 5 s for 64 rows of SmolLM2, against 74 KB copied here.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    packed = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        packed.remove()


def _check(model: Any, tokenizer: Any, batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected 1 or more.")
    if not callable(tokenizer):
        raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}; expected the model's own.")
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise ConfigError(
            f"model is a {type(model).__name__}; expected a causal language model of transformers. "
            f"For another module use esfast.EvolutionStrategy with a loop of your own."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{type(model).__name__} is an encoder-decoder; expected a decoder-only language model."
        )
    _require_cache(model)


def _require_cache(model: Any) -> None:
    """Mamba and its like hide the cache in arguments that they ignore, and would see one token."""
    takes = "past_key_values" in inspect.signature(model.forward).parameters
    if not takes or model.config.model_type == "recurrent_gemma":  # keeps its state in itself
        raise ConfigError(
            f"{type(model).__name__} does not take the tokens seen so far as past_key_values, with "
            "which this engine decodes; choose a model with attention, or use "
            "esfast.EvolutionStrategy with a loop of your own around model.generate."
        )
