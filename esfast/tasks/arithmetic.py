"""Small sums answered with the bare equation: the default task.

Asked "What is 7 * 8? Reply with the bare equation.", a small chat model starts to explain, and the
answer limit cuts it off. The instruction is what has to be learned; reaching the right number comes
with it, since a model that writes out "7 * 8 = " mostly completes it rightly.

Reward: 1 for the equation and nothing else ("7 * 8 = 56", a full stop allowed). Otherwise up to
0.6, so that members that come closer are told apart: 0.5 times the share of the equation, from its
left, that begins the answer (0.25 where it stands further in), and 0.1 for the right number.

Problems are a + b and a - b >= 0 for 1 to 12, and a * b for 1 to 9. A third of them is held out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from esfast.tasks.base import Example, PoolTask, Score, split

HELD_OUT_SHARE = 1 / 3
LARGEST = {"+": 12, "-": 12, "*": 9}

PROMPT = "What is {problem}? Reply with the bare equation."


class Arithmetic(PoolTask):
    """303 problems; see the module for the reward."""

    name = "arithmetic"
    max_new_tokens = 13
    """The longest equation, "12 + 12 = 24", takes 12 tokens of single digits with its end."""

    def __init__(self) -> None:
        examples = [_example(*problem) for problem in _problems()]
        super().__init__(*split(examples, HELD_OUT_SHARE))

    def score(self, example: Example, completion: str) -> Score:
        """1 for exactly the equation, up to 0.6 for parts of it."""
        equation, result = example.data["equation"], example.data["result"]
        text = completion.strip()
        if text.removesuffix(".") == equation:
            return Score(1.0, "Right.", solved=True)
        value = _resemblance(text, equation) + 0.1 * _names(text, example.id, result)
        return Score(value, f"Expected {equation!r} and nothing else.", solved=False)


def _resemblance(text: str, equation: str) -> float:
    """0 to 0.5: how much of the equation's beginning the text has."""
    length = next(n for n in range(len(equation), -1, -1) if equation[:n] in text)
    weight = 0.5 if text.startswith(equation[:length]) else 0.25
    return weight * length / len(equation)


def _names(text: str, problem: str, result: int) -> bool:
    """Whether the result stands in the text, other than in the problem repeated."""
    return re.search(rf"(?<!\d){result}(?!\d)", text.replace(problem, "")) is not None


def _problems() -> Iterator[tuple[int, str, int]]:
    for operator, largest in LARGEST.items():
        for left in range(1, largest + 1):
            for right in range(1, (left if operator == "-" else largest) + 1):
                yield left, operator, right


def _example(left: int, operator: str, right: int) -> Example:
    problem = f"{left} {operator} {right}"
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    data = {"equation": f"{problem} = {result}", "result": result}
    return Example(problem, PROMPT.format(problem=problem), data)
