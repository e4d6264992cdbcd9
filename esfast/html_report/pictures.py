"""The report's figures: inlined in the page, and as PNGs in the folder beside it."""

from __future__ import annotations

from pathlib import Path

from esfast.errors import ConfigError
from esfast.html_report.drawing import Draw, drawn
from esfast.html_report.page import Html, figure
from esfast.whole_file import write_whole


class Pictures:
    """Draws, keeps the PNGs, and writes them at the end."""

    def __init__(self, made: str) -> None:
        self._made = made
        self._files: dict[str, bytes] = {}

    def add(self, name: str, draw: Draw, height: float, caption: object) -> Html:
        """A figure of the page; `name` is its PNG's, without the ending."""
        made = drawn(draw, height, self._made)
        self._files[name] = made.png
        return figure(made.light, made.dark, caption, str(caption))

    def write(self, folder: Path) -> list[Path]:
        """NAME.png each. ConfigError where the folder cannot be made."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make the folder {folder}: {error.strerror or error}; give another "
                "--output."
            ) from None
        for name, data in self._files.items():
            write_whole(folder / f"{name}.png", data)
        return [folder / f"{name}.png" for name in self._files]
