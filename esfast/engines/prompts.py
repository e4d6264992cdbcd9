"""From prompts to batches of token ids.

A batch is decided by the prompts alone: rows are sorted by length (ties by position), cut into
groups of nearly equal size, and padded on the left. All members of a generation therefore see the
same shapes, in any process.

Where every prompt begins with the same tokens (a system prompt, the wording of a task) these are
split off as the plan's `prefix`, to be computed once. Every row keeps at least one token of its
own.

Models without a chat template get plain text. A `str` prompt is then taken as it is; messages, and
a `str` with a system prompt, become `System: ...`, `User: ...`, `Assistant: ...` paragraphs with an
empty line between, ending in `Assistant:`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, TypeVar

import torch

from esfast.engines.base import Message, Prompt, is_message
from esfast.errors import ConfigError, DataError

# A prefix costs one more forward pass, about as much as 100 tokens in a larger one (SmolLM2-135M
# on a CPU: 26 tokens alone 39 ms, 608 tokens 355 ms). It must save more than that.
LEAST_TOKENS_SAVED = 128
# Training prompts, held-out prompts, and a few more lists that a loop may alternate between.
PLANS_KEPT = 8
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Batch:
    """Rows to decode together, without the plan's prefix.

    `rows`: their positions in the list of prompts. `ids` [B, W]: int64 tokens, padded on the left.
    `mask` [B, P + W]: int64, 0 on padding, P the length of the prefix. `positions` [B, W]: the
    position of each token in its own text, the prefix counted, the padding not.
    """

    rows: tuple[int, ...]
    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """How a list of prompts is computed: `prefix` [1, P] once (P may be 0), then each batch."""

    prefix: torch.Tensor
    batches: tuple[Batch, ...]
    lengths: tuple[int, ...]


def uses_chat(tokenizer: Any, chat: bool | None) -> bool:
    """Whether prompts go through a chat template: what `chat` says, None where there is one.
    ConfigError where it says so and there is none."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise ConfigError(
            "chat=True, but the tokenizer has no chat template. Leave chat out to give the prompts "
            "as plain text, or set tokenizer.chat_template."
        )
    return has_template if chat is None else chat


def kept(plans: OrderedDict[Hashable, Kept], key: Hashable, make: Callable[[], Kept]) -> Kept:
    """What `plans` has of `key`, made where it has none; those used last stay."""
    plan = plans.pop(key, None)
    plans[key] = found = make() if plan is None else plan
    if len(plans) > PLANS_KEPT:
        plans.popitem(last=False)
    return found


def key(prompts: Sequence[Prompt]) -> Hashable:
    """Equal for equal lists of prompts. Raises DataError for what is no prompt."""
    if isinstance(prompts, str):
        raise DataError(f"prompts is the text {prompts!r:.60}; expected a list of prompts.")
    return tuple(
        prompt if isinstance(prompt, str) else repr(_checked(prompt, at))
        for at, prompt in enumerate(prompts)
    )


def tokenize(
    prompts: Sequence[Prompt], tokenizer: Any, system_prompt: str | None, chat: bool
) -> list[list[int]]:
    """Token ids of each prompt that `key` accepts, through the tokenizer's chat template if `chat`.

    Raises DataError for what the template refuses, and for a prompt of no tokens.
    """
    if chat:
        texts = _chat_texts([_conversation(p, system_prompt) for p in prompts], tokenizer)
    else:
        texts = [_plain_text(prompt, system_prompt) for prompt in prompts]
    # A template writes the special tokens itself; plain text gets the tokenizer's own.
    rows = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
    for at, row in enumerate(rows):
        if not row:
            raise DataError(f"prompt {at} has no tokens: {texts[at]!r}. Give it some text.")
    return [list(row) for row in rows]


def make_plan(rows: Sequence[list[int]], batch_size: int, pad: int, share_prefix: bool) -> Plan:
    """Sort, cut and pad `rows` (token ids, none empty); see the head of this file."""
    shared = common_prefix(rows) if share_prefix else 0
    if (len(rows) - 1) * shared < LEAST_TOKENS_SAVED:
        shared = 0
    order = sorted(range(len(rows)), key=lambda at: (len(rows[at]), at))
    groups = -(-len(rows) // batch_size)
    cuts = [len(rows) * group // groups for group in range(groups + 1)]
    batches = [_pad_left(order[start:end], rows, shared, pad) for start, end in pairwise(cuts)]
    prefix = torch.tensor([rows[0][:shared]], dtype=torch.int64, device="cpu")
    return Plan(prefix, tuple(batches), tuple(len(row) for row in rows))


def require_length(
    prompts: Sequence[Prompt],
    lengths: Sequence[int],
    new_tokens: int,
    context: int | None,
    kind: str = "prompt",
) -> int | None:
    """Tokens that the longest prompt and its answer leave of the context, None without one.

    lengths: of the prompts in tokens; kind: what they are. Raises ConfigError, naming the longest,
    unless all fit.
    """
    if context is None:
        return None
    longest = max(lengths)
    if longest + new_tokens <= context:
        return context - longest - new_tokens
    at = lengths.index(longest)
    raise ConfigError(
        f"{kind} {at} ({first_words(prompts[at])!r}) has {longest} tokens; with max_new_tokens="
        f"{new_tokens} it needs {longest + new_tokens}, and the model's context holds {context}. "
        "Shorten the prompt or leave it out, lower max_new_tokens (--max-new-tokens; of esfast "
        "forgetting --kl-tokens or --score-tokens), or take a model with a longer context."
    )


def first_words(prompt: Prompt) -> str:
    """How a prompt begins, in one line of 50 characters at most; of messages, the last one."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    words = " ".join(text[:1000].split())
    return words if len(words) <= 50 else f"{words[:47]}..."


def common_prefix(rows: Sequence[list[int]]) -> int:
    """How many first tokens all rows share, leaving each at least one of its own."""
    first, last = min(rows), max(rows)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last)))  # noqa: B905
    return min(same, min(len(row) for row in rows) - 1)


def _pad_left(group: Sequence[int], rows: Sequence[list[int]], shared: int, pad: int) -> Batch:
    own = [rows[at][shared:] for at in group]
    width = max(len(row) for row in own)
    tokens = [[pad] * (width - len(row)) + row for row in own]
    seen = [[1] * shared + [0] * (width - len(row)) + [1] * len(row) for row in own]
    # By name: torch.set_default_device would have them elsewhere.
    ids, mask = (torch.tensor(rows, device="cpu") for rows in (tokens, seen))
    positions = (mask.cumsum(1) - 1).clamp_(min=0)[:, shared:].contiguous()
    return Batch(tuple(group), ids, mask, positions)


def _checked(prompt: Any, at: int) -> list[dict[str, str]]:
    """The messages of `prompt`. Raises DataError, naming prompt `at`, if it is no conversation."""
    if isinstance(prompt, Sequence) and prompt and all(map(is_message, prompt)):
        return [dict(message) for message in prompt]
    raise DataError(
        f"prompt {at} is {prompt!r:.120}; expected a text, or a list of messages such as "
        f"[{{'role': 'user', 'content': '2 + 2?'}}]."
    )


def _conversation(prompt: Prompt, system_prompt: str | None) -> list[Message]:
    turns: list[Message] = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    )
    if system_prompt is None or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": system_prompt}, *turns]


def _chat_texts(conversations: list[list[Message]], tokenizer: Any) -> list[str]:
    try:
        return list(
            tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
        )
    except Exception as error:  # whatever the template's own code raises
        raise DataError(
            f"the model's chat template refuses these prompts: {error}. Some templates know no "
            f"system role: put the system prompt's text into the user's message."
        ) from None


def _plain_text(prompt: Prompt, system_prompt: str | None) -> str:
    if isinstance(prompt, str) and system_prompt is None:
        return prompt
    turns = _conversation(prompt, system_prompt)
    said = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
    return "\n\n".join([*said, "Assistant:"])
