"""GSM8K from a local JSONL file: grade-school word problems with a whole-number answer.

Rows are {"question": ..., "answer": "... #### 42"}, as the data set is distributed (Cobbe et al.,
arXiv 2110.14168). Nothing is fetched. Reward: 1 for the right number, else 0. The answer is the
number after the last "####", and without one the last number of the completion.
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

from esfast.errors import ConfigError, DataError
from esfast.tasks.base import Example, PoolTask, Score, split
from esfast.tasks.draws import digest_int
from esfast.tasks.json_lines import read_rows

HELD_OUT_SHARE = 0.1
MARK = "####"
MINUS = "\u2212"  # the typographer's, which models write too

# 1,501.5, .5, -5 and -$5; the 5 of 10-5 has no sign, and that of 1.2.5 or v.5 no decimal point.
_NUMBER = re.compile(r"(?:(?<!\d)-\$?)?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+)")

INSTRUCTION = f'Think step by step, then end with "{MARK}" and the answer as a number.'


class Gsm8k(PoolTask):
    """Trains on `data`; holds out `eval_data`, or a tenth of `data` where none is given."""

    name = "gsm8k"
    max_new_tokens = 256

    def __init__(self, data: str | Path | None = None, eval_data: str | Path | None = None) -> None:
        """Raises DataError for a file that is missing or not of that form."""
        if data is None:
            raise ConfigError(
                "task gsm8k reads a local file; give it with --data train.jsonl, or to esfast "
                "continual with --task-option gsm8k:data=train.jsonl "
                '(rows: {"question": ..., "answer": "... #### 42"}).'
            )
        rows = _examples(Path(data))
        if eval_data is None:
            train, held_out = split(rows, HELD_OUT_SHARE)
        else:
            train, held_out = rows, _examples(Path(eval_data))
        super().__init__(train, held_out)

    def score(self, example: Example, completion: str) -> Score:
        """1 where the completion's number equals the reference, else 0."""
        found = final_number(completion)
        expected: Decimal = example.data["number"]
        if found is None:
            return Score(0.0, "There is no number in the answer.", solved=False)
        if found != expected:
            return Score(0.0, f"The answer {found} is wrong; it is {expected}.", solved=False)
        return Score(1.0, "Right.", solved=True)


def final_number(text: str) -> Decimal | None:
    """The number after the last mark, else the last number; None where there is none."""
    _, mark, after = text.rpartition(MARK)
    found = _NUMBER.findall((after if mark else text).replace(MINUS, "-"))
    if not found:
        return None
    digits = (found[0] if mark else found[-1]).replace(",", "").replace("$", "")
    return Decimal(digits[:40])


def _examples(path: Path) -> list[Example]:
    examples: dict[str, Example] = {}
    for line, row in read_rows(path, required=("question", "answer")):
        question, answer = row["question"], row["answer"]
        number = final_number(answer) if isinstance(answer, str) and MARK in answer else None
        if number is None or not isinstance(question, str):
            raise DataError(
                f'{path} line {line}: expected a "question" in words and an "answer" that ends '
                f'with "{MARK} 42".'
            )
        asked = question.strip()  # of which the key is made as well: one prompt, one problem
        key = f"{digest_int(asked):016x}"
        examples[key] = Example(key, f"{asked}\n{INSTRUCTION}", {"number": number})
    return list(examples.values())
