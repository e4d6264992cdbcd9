"""A reward function of one's own: short answers that name the right thing.

    cd examples
    esfast train --reward short_answers:score --data short_answers.jsonl --max-new-tokens 24

A row of the data has a "prompt" and here "names", the words of which the answer should have one.
The function gets the row and what the model wrote; it returns the reward, and may add in words
what was right or wrong.
"""

from __future__ import annotations

WORDS = 6
"""An answer may be this long before it costs."""


def score(example: dict, completion: str) -> tuple[float, str]:
    """1 for a right answer of at most six words; a tenth less for each further word, 0 if wrong."""
    if not any(name.lower() in completion.lower() for name in example["names"]):
        return 0.0, f"The answer should name {example['names'][0]}."
    excess = max(0, len(completion.split()) - WORDS)
    return max(0.1, 1.0 - 0.1 * excess), "Shorter, please." if excess else "Right, and short."
