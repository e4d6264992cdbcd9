"""Names that begin with ~. A shell writes the home folder there in `--output ~/run`; bash does not
in `--output=~/run`, and nobody does where a program starts the command."""

from __future__ import annotations

import argparse
from pathlib import Path


def at_home(name: str | Path) -> Path:
    """`name` with the home folder that its ~ means; as it is where there is none: HOME is not set
    and the user unknown, as in many a container, or it is ~somebody who is not here."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def place(text: str) -> str:
    """The same of a flag's text."""
    return str(at_home(text)) if text.startswith("~") else text


def model_place(text: str) -> str:
    """The same of a flag that a model is to be written under."""
    try:
        text.encode()
    except UnicodeEncodeError:
        said = f"{text!r} is no UTF-8, as names have to be that safetensors writes to"
        raise argparse.ArgumentTypeError(said) from None
    return place(text)
