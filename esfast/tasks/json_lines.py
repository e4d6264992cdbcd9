"""Reads a JSONL file of prompts: one JSON object a line, blank lines and a byte order mark allowed.

Every complaint names the file and the line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esfast.engines.base import Prompt, is_message
from esfast.errors import DataError


def read_rows(path: Path, required: tuple[str, ...]) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of each line; every row has the `required` keys.

    Raises DataError for a missing or empty file, a line that is no JSON object, a missing key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append((number, _row(path, number, line, required)))
    if not rows:
        raise DataError(f"{path} has no rows; expected one JSON object a line.")
    return rows


def prompt_of(path: Path, number: int, row: dict[str, Any]) -> Prompt:
    """The row's "prompt": a non-empty string, or chat messages with "role" and "content".

    Raises DataError where it is neither.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(map(is_message, prompt)):
        return prompt
    raise DataError(
        f'{path} line {number}: "prompt" is {_short(prompt)}; expected a non-empty string, or a '
        'list of messages such as {"role": "user", "content": "..."}.'
    )


def _row(path: Path, number: int, line: str, required: tuple[str, ...]) -> dict[str, Any]:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start : error.end])
        raise DataError(
            f"{path} line {number}: it holds {half}, half of a character (a surrogate), which no "
            "tokenizer takes; write the whole character."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} line {number}: not JSON ({error}).") from None
    if not isinstance(row, dict):
        raise DataError(f"{path} line {number}: {_short(row)} is no JSON object.")
    missing = [key for key in required if key not in row]
    if missing:
        raise DataError(
            f"{path} line {number}: no {_quoted(missing)}; the row has {_quoted(list(row))}. "
            f"Expected {_quoted(list(required))} in every row."
        )
    return row


def _quoted(keys: list[str]) -> str:
    return ", ".join(f'"{key}"' for key in keys) or "no keys"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
