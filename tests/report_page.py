"""A report as it is read: its words, its tags, and whether they nest."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from esfast import cli

VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """The text, the tags, and whether they nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """All that is read, with single spaces."""
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def words_of(*runs: Path, flags: tuple[str, ...] = ()) -> str:
    """The text of a report of these runs, written beside the first."""
    output = runs[0].parent / "report.html"
    assert cli.main(["report", *map(str, runs), "-o", str(output), *flags]) == 0
    return Page(output.read_text(encoding="utf-8")).text
