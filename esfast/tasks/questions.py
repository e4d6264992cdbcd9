"""Questions whose answer is a word or a name: a JSONL file, or one of the small sets kept here.

    esfast train --prior-tasks questions:capitals,questions:opposites,facts.jsonl
    esfast train --task questions:plurals

A row is {"prompt": ..., "answer": "Paris"} or {"prompt": ..., "answers": ["Kyiv", "Kiev"]}. Reward:
1 where one of the answers stands in the completion as words of its own, whatever its case, else 0;
5 does not stand in -5, 3.5 or 1,500. Rows with one prompt are one question with all their answers.
A sentence around it costs nothing, so that a fine-tune that changes how a model words its answers
is told apart from one that makes it forget. Not told apart: an answer that names the right word
among wrong ones.

The sets (written for esfast, under its licence; 64 rows each) are questions that
SmolLM2-135M-Instruct mostly answers rightly, so that it has something to lose.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from esfast.errors import ConfigError, DataError
from esfast.tasks.base import Example, PoolTask, Score, split
from esfast.tasks.draws import digest_int
from esfast.tasks.json_lines import prompt_of, read_rows

HELD_OUT_SHARE = 0.25
SETS = Path(__file__).with_name("data")

# A number is no part of another: 5 is not in 3.5, 1,5, .5, -5 or 3-5, but it is in $5 and A-5.
_BEFORE_NUMBER = r"(?<![\w.,\u2212])(?<!(?<![^\W\d])-)(?<![-\u2212]\$)"
_AFTER_NUMBER = r"(?!\w|[.,]\d)"


class Questions(PoolTask):
    """Trains on three quarters of the questions and holds out the rest."""

    max_new_tokens = 16

    def __init__(
        self, dataset: str = "", data: str | Path | None = None, evaluation_only: bool = False
    ) -> None:
        """`dataset`: a set kept here; `data`: a file of the user's, instead. `evaluation_only`:
        every question is held out and none is trained on.

        Raises ConfigError for an unknown set, DataError for bad rows.
        """
        path = Path(data) if data is not None else _kept(dataset)
        self.name = f"questions:{path.stem}"
        examples = _examples(path)
        train, held_out = ([], examples) if evaluation_only else split(examples, HELD_OUT_SHARE)
        super().__init__(train, held_out, evaluation_only=evaluation_only)

    def score(self, example: Example, completion: str) -> Score:
        """1 where an accepted answer is named."""
        answers = example.data["answers"]
        if any(_names(completion, answer) for answer in answers):
            return Score(1.0, "Right.", solved=True)
        return Score(0.0, f"The answer is {answers[0]}.", solved=False)


def _names(text: str, answer: str) -> bool:
    begins = _BEFORE_NUMBER if answer[0].isdecimal() else r"(?<!\w)"
    ends = _AFTER_NUMBER if answer[-1].isdecimal() else r"(?!\w)"
    return re.search(f"{begins}{re.escape(answer)}{ends}", text, re.IGNORECASE) is not None


def _kept(name: str) -> Path:
    path = SETS / f"{name}.jsonl"
    there = sorted(file.stem for file in SETS.glob("*.jsonl"))
    if name not in there:
        raise ConfigError(
            f"there is no set of questions {name!r}; there are {', '.join(there)}. Write "
            "questions:NAME, or give a file of your own: with --data, and as a prior task or in "
            "--tasks FILE.jsonl itself."
        )
    return path


def _examples(path: Path) -> list[Example]:
    examples: dict[str, Example] = {}
    for line, row in read_rows(path, required=("prompt",)):
        example = _example(path, line, row)
        earlier = examples.get(example.id, example)
        answers = dict.fromkeys([*earlier.data["answers"], *example.data["answers"]])
        examples[example.id] = replace(earlier, data={"answers": list(answers)})
    return list(examples.values())


def _example(path: Path, line: int, row: dict[str, Any]) -> Example:
    prompt = prompt_of(path, line, row)
    answers = row.get("answers", [row["answer"]] if "answer" in row else None)
    if not isinstance(answers, list) or not answers or not all(map(_is_answer, answers)):
        raise DataError(
            f'{path} line {line}: expected an "answer" that is a word or more, or "answers" that '
            "is a list of such, any of which is right."
        )
    key = f"{digest_int(json.dumps(prompt, sort_keys=True)):016x}"
    return Example(key, prompt, {"answers": [answer.strip() for answer in answers]})


def _is_answer(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
