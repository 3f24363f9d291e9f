"""The outline of an HTML page: what tests of pages look at."""

from __future__ import annotations

from html.parser import HTMLParser


class Outline(HTMLParser):
    """Tags that are open at the end, every tag name and every attribute value."""

    VOID = ("meta", "line", "circle", "path", "rect", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.values: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.values += [value or "" for _, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID and tag != "p":
            while self.open and self.open[-1] == "p" != tag:
                self.open.pop()
            assert self.open.pop() == tag
        elif tag == "p":
            self.open.remove("p")
