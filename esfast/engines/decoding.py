"""The decoding loop of TransformersEngine: a plan of batches in, completions out.

    prefix once -> each batch: prompt -> token -> forward of one token a row -> token -> ...

A row ends at an end token, at a stop text or after `max_new_tokens`. Rows that ended go on being
computed, unseen, until at most half of the batch is unfinished; then the batch shrinks. Its shapes
are a function of the prompts and the tokens chosen, so the same weights give them again.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import Cache

from esfast.engines import kv_cache
from esfast.engines.base import Completion, Sampling
from esfast.engines.choosing import Chooser
from esfast.engines.prompts import Batch, Plan

# New tokens that a cache has room for at first; short answers never copy it.
FIRST_ROOM = 64


@dataclass(frozen=True)
class Ends:
    """`tokens`: the ids that end an answer. `pad`: the id that fills rows, hidden by the mask."""

    tokens: frozenset[int]
    pad: int

    @staticmethod
    def of(model: Any, tokenizer: Any) -> Ends:
        """As the model's generation configuration and its tokenizer say."""
        configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ids = [configured] if isinstance(configured, int) else list(configured or [])
        own = getattr(tokenizer, "eos_token_id", None)
        ids += [own] if own is not None else []
        pad = getattr(tokenizer, "pad_token_id", None)
        return Ends(frozenset(ids), pad if pad is not None else min(ids, default=0))

    def and_stops(self, tokenizer: Any, stop: Sequence[str]) -> Ends:
        """With the special tokens among the stop texts, which no decoded text shows."""
        known = getattr(tokenizer, "added_tokens_decoder", {})
        also = {number for number, one in known.items() if one.special and one.content in stop}
        return replace(self, tokens=self.tokens | also)


@dataclass
class _Row:
    """One answer in the making."""

    prompt: int
    tokens: list[int] = field(default_factory=list)
    finished: bool = False


class Decoder:
    """Decodes one plan under the weights as they are now."""

    def __init__(self, model: Any, tokenizer: Any, ends: Ends, sampling: Sampling) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._ends = ends.and_stops(tokenizer, sampling.stop)
        self._sampling = sampling
        accepted = inspect.signature(model.forward).parameters
        # An index, not the number 1: the slice that 1 makes is not contiguous, and where weights
        # want no gradient torch may then copy the output matrix for every row (32 rows: 1.8 GB,
        # up to 2.4 s on a core).
        last = {"logits_to_keep": torch.tensor([-1], device=model.device)}
        self._last_only = last if "logits_to_keep" in accepted else {}
        self._takes_positions = "position_ids" in accepted

    def run(self, plan: Plan) -> list[Completion]:
        """One completion a prompt of the plan, in the order of the prompts."""
        prefix = self._prefix(plan.prefix)
        rows = [row for batch in plan.batches for row in self._batch(batch, prefix)]
        rows.sort(key=lambda row: row.prompt)
        return self._completions(rows, plan.lengths)

    def _prefix(self, ids: torch.Tensor) -> Cache | None:
        """The cache of the common prefix, one row; None where there is none."""
        length = ids.shape[1]
        if length == 0:
            return None
        cache = kv_cache.new_cache(self._model.config, length)
        positions = torch.arange(length, device="cpu")[None]
        self._forward(ids, torch.ones_like(ids), positions, cache)
        return cache

    def _batch(self, batch: Batch, prefix: Cache | None) -> list[_Row]:
        new = self._sampling.max_new_tokens
        capacity = batch.mask.shape[1] + min(new, FIRST_ROOM)
        if prefix is None:
            cache = kv_cache.new_cache(self._model.config, capacity)
        else:
            cache = kv_cache.share(prefix, len(batch.rows), capacity)
        rows = [_Row(prompt) for prompt in batch.rows]
        chooser = Chooser(self._sampling, batch.rows)
        # 1 for every token to come: a slice of this is the mask of each step.
        mask = torch.nn.functional.pad(batch.mask, (0, new), value=1)
        self._decode(batch, mask, cache, rows, chooser)
        return rows

    def _decode(
        self, batch: Batch, mask: torch.Tensor, cache: Cache, rows: list[_Row], chooser: Chooser
    ) -> None:
        """Fill `rows`, which are the batch's."""
        live = list(range(len(rows)))
        seen = batch.mask.shape[1]
        ids, positions = batch.ids, batch.positions
        for step in range(self._sampling.max_new_tokens):
            logits = self._forward(ids, mask[:, : seen + step], positions, cache)
            tokens = chooser.choose(logits, live, step)
            self._take(tokens.tolist(), [rows[at] for at in live])
            unfinished = [at for at, row in enumerate(live) if not rows[row].finished]
            if not unfinished:
                break
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            if 2 * len(unfinished) <= len(live):
                keep = torch.tensor(unfinished, device="cpu")
                ids, positions, mask = ids.cpu()[keep], positions[keep], mask[keep]
                kv_cache.keep_rows(cache, keep.to(self._model.device))
                live = [live[at] for at in unfinished]

    def _take(self, tokens: list[int], rows: list[_Row]) -> None:
        """Append each row's token and see whether it ends there."""
        for token, row in zip(tokens, rows, strict=True):
            if row.finished:
                continue
            row.tokens.append(token)
            row.finished = token in self._ends.tokens or self._at_stop(row.tokens)

    def _at_stop(self, tokens: list[int]) -> bool:
        stop = self._sampling.stop
        if not stop:
            return False
        # A text of n characters has at most 4 n bytes of UTF-8, and a token at least one of them.
        tail = self._text(tokens[-(4 * max(map(len, stop)) + 4) :])
        return any(text in tail for text in stop)

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _completions(self, rows: list[_Row], lengths: Sequence[int]) -> list[Completion]:
        completions = []
        for row in rows:
            text = self._text(row.tokens)
            for stop in self._sampling.stop:
                text = text.split(stop, 1)[0]
            read = lengths[row.prompt]
            ids = tuple(row.tokens)
            completions.append(Completion(text, len(ids), row.finished, ids, read))
        return completions

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] at the last position."""
        device = self._model.device
        placed = {"position_ids": positions.to(device)} if self._takes_positions else {}
        out = self._model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=cache,
            use_cache=True,
            **placed,
            **self._last_only,
        )
        logits: torch.Tensor = out.logits[:, -1]
        return logits
