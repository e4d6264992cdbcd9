"""Countdown: reach a target with the four operations, each given number used exactly once.

Reward, of the form in the evolution-strategies paper (Qiu et al., arXiv 2509.24372): 0.1 for the
format (thoughts up to </think>, then one answer in <answer> tags and nothing after it) or nothing
where any of it is missing, plus 1.0 for a right answer, whatever the format: 0, 0.1, 1.0 or 1.1.
The last answer counts. It is read by `esfast.tasks.expression`, never evaluated: powers, signs
before a number and integer division, which Python's own evaluation would let through, are refused.

Problems are made from the seed, offline. Every one has a solution, since the target is computed
from the numbers. Options may leave fewer problems than are asked for: then the held-out ones are
those that there are, and a training batch deals its own again.
"""

from __future__ import annotations

import re
from itertools import cycle, islice

from esfast.errors import ConfigError
from esfast.tasks.base import Example, Score, Task
from esfast.tasks.draws import Draws, is_held_out
from esfast.tasks.expression import ExpressionError, evaluate

FORMAT_REWARD = 0.1
ANSWER_REWARD = 1.0
HELD_OUT_SHARE = 0.1
FARTHEST = 20  # times the largest target: 47 ms a problem at 10 times, 330 at 100
PATIENCE = 5_000
"""Draws in a row without a new problem, after which there are no more: 0.2 s to 0.5 s. Three
numbers to 9 with targets to 20, 60 held out in all, take 2,400 draws to the last of them."""

# For a completion without whitespace around it. What may come first (<think> or not) is not told
# apart: any choice there that fails would be tried again at each place, in quadratic time.
_FORMAT = re.compile(r".*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

PROMPT = (
    "Combine the numbers {numbers} with +, -, * and / so that the result is {target}. "
    "Use each number exactly once; parentheses are allowed. Think inside <think> </think> tags, "
    "then give the expression inside <answer> </answer> tags, "
    "for example <answer>(1 + 2) / 3</answer>."
)


class Countdown(Task):
    """Three or four numbers from 1 to 99, a target from 10 to 99, unless options say otherwise."""

    name = "countdown"
    max_new_tokens = 256

    def __init__(
        self, min_numbers: int = 3, max_numbers: int = 4, max_value: int = 99, max_target: int = 99
    ) -> None:
        """Raises ConfigError for sizes that leave no problems to make."""
        if not 2 <= min_numbers <= max_numbers <= 8:
            raise ConfigError(
                f"countdown got min_numbers={min_numbers} and max_numbers={max_numbers}; "
                "expected 2 <= min_numbers <= max_numbers <= 8."
            )
        if max_value < 9 or max_target < 20:
            raise ConfigError(
                f"countdown got max_value={max_value} and max_target={max_target}; "
                "expected at least 9 and 20."
            )
        if max_value > FARTHEST * max_target:
            raise ConfigError(
                f"countdown got max_value={max_value} and max_target={max_target}, and numbers so "
                f"large hardly ever reach a target so small; expected at most {FARTHEST} times it."
            )
        self._sizes = (min_numbers, max_numbers)
        self._max_value = max_value
        self._targets = (10, max_target)

    def train_batch(self, seed: int, generation: int, count: int) -> list[Example]:
        """Fresh problems every generation; none twice, unless the options leave too few."""
        found = self._examples(Draws("countdown", seed, generation), count, held_out=False)
        return list(islice(cycle(found), count))  # again from the first where there are too few

    def held_out(self, count: int) -> list[Example]:
        """The first `count` problems of the held-out stream, or all that it has."""
        return self._examples(Draws("countdown", "held-out"), count, held_out=True)

    def score(self, example: Example, completion: str) -> Score:
        """0.1 for the format and 1.0 for an answer that reaches the target."""
        has_format = completion.count("<answer>") == 1 and bool(
            _FORMAT.fullmatch(completion.strip())
        )
        right, feedback = self._judge(example, completion)
        value = FORMAT_REWARD * has_format + ANSWER_REWARD * right
        if not has_format:
            feedback += " Expected <think>...</think> and then <answer>...</answer>, nothing else."
        return Score(value, feedback, solved=right)

    def _judge(self, example: Example, completion: str) -> tuple[bool, str]:
        # up to the last end: each beginning without one would look for it through all of the rest
        answers = _ANSWER.findall("".join(completion.rpartition("</answer>")[:2]))
        if not answers:
            return False, "There is no <answer>...</answer>."
        try:
            value, used = evaluate(answers[-1])
        except ExpressionError as error:
            return False, f"The answer is no arithmetic expression: {error}."
        numbers, target = example.data["numbers"], example.data["target"]
        if sorted(used) != sorted(numbers):
            return False, f"The answer uses {used}; each of {numbers} has to be used exactly once."
        if value != target:
            return False, f"The answer is worth {value}, not {target}."
        return True, "Right."

    def _examples(self, draws: Draws, count: int, held_out: bool) -> list[Example]:
        examples: dict[str, Example] = {}
        in_vain = 0
        while len(examples) < count and in_vain < PATIENCE:
            numbers, target = self._problem(draws)
            key = f"{' '.join(map(str, sorted(numbers)))} -> {target}"
            before = len(examples)
            if is_held_out(key, HELD_OUT_SHARE) == held_out:
                prompt = PROMPT.format(numbers=", ".join(map(str, numbers)), target=target)
                examples[key] = Example(key, prompt, {"numbers": numbers, "target": target})
            in_vain = 0 if len(examples) > before else in_vain + 1
        return list(examples.values())

    def _problem(self, draws: Draws) -> tuple[list[int], int]:
        while True:
            count = draws.between(*self._sizes)
            numbers = [draws.between(1, self._max_value) for _ in range(count)]
            target = _combine(numbers, draws)
            if target is not None and self._targets[0] <= target <= self._targets[1]:
                return numbers, target


def _combine(numbers: list[int], draws: Draws) -> int | None:
    """A value that `numbers` reach in whole positive steps; None where the draw leaves them."""
    values = draws.shuffled(numbers)
    while len(values) > 1:
        values = draws.shuffled(values)
        left, right = values.pop(), values.pop()
        operator = draws.choice("+-*/")
        if (operator == "-" and left <= right) or (operator == "/" and left % right):
            return None
        steps = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}
        values.append(steps[operator])
    return values[0]
