"""Reward of the study's own prior task, prior/writing.jsonl: one sentence about a topic.

Standard library only: esfast runs a reward function in a process of its own.
"""

from __future__ import annotations

import re
from typing import Any

FEWEST_WORDS = 6
PHRASE = 3


def fluent(example: dict[str, Any], completion: str) -> float:
    """1 for at least six words that name the topic and repeat no phrase of three; else 0.

    Repeating itself is how a small model fails at this. What it says is not judged.
    """
    words = re.findall(r"\w+", completion.casefold())
    phrases = [tuple(words[place : place + PHRASE]) for place in range(len(words) - PHRASE + 1)]
    named = any(answer.casefold() in completion.casefold() for answer in example["answers"])
    return float(len(words) >= FEWEST_WORDS and named and len(set(phrases)) == len(phrases))
