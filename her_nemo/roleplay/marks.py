"""Finding the marks of CoSER's and the starred dialect: `[thought]`, `(action)`, `*action*`.

A mark that opens or closes something becomes a `Tag`; one that is only punctuation (`[sic]`, the parenthesis
inside a thought, `2 * 3`, the `)` of `1)`) stays in the text. Time is linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.tags import Tag

# Full-width square brackets and lenticular brackets, full-width parentheses and asterisk.
_WIDE = {
    "\uff3b": "[",
    "\uff3d": "]",
    "\u3010": "[",
    "\u3011": "]",
    "\uff08": "(",
    "\uff09": ")",
    "\uff0a": "*",
}
_COSER = re.compile(r"[\[\]()\uff3b\uff3d\u3010\u3011\uff08\uff09]")
_STARS = re.compile(r"\*+|\uff0a")
# Brackets that an editor puts into what is said. Whatever is not on this list is a thought.
_EDITORIAL = re.compile(
    r"\[(?:sic[.!?]?|\.{2,6}|\u2026|[?!]{1,3}|ed\.|emphasis (?:added|mine)|redacted|inaudible|unintelligible"
    r"|illegible|censored|expletive deleted)\]",
    re.IGNORECASE,
)
_FOOTNOTE = re.compile(r"\[\d{1,3}\]")  # directly after a word: "as he wrote[12]"
_LETTER_CHANGED = re.compile(r"\[[A-Za-z]\]")  # inside a word: "[t]he", "the[m]"
_ENDING_CHANGED = re.compile(r"\[(?:ed|es|en|er|ing|ly|'s|\u2019s)\]")  # "walk[ed]"

Span = tuple[int, int]


def _outside(matches: Iterable[re.Match[str]], taken: list[Span]) -> Iterator[re.Match[str]]:
    """The matches that do not begin inside a taken span; both come in order."""
    spans = iter(taken)
    span = next(spans, None)
    for match in matches:
        while span is not None and span[1] <= match.start():
            span = next(spans, None)
        if span is None or match.start() < span[0]:
            yield match


def _editorial_end(text: str, at: int) -> int | None:
    """End of an editor's bracket that begins at `at`, or None when it may be a thought."""
    if found := _EDITORIAL.match(text, at):
        return found.end()
    before, ascii_letter = text[at - 1 : at], re.compile(r"[A-Za-z]")
    if (found := _FOOTNOTE.match(text, at)) and before.strip():
        return found.end()
    after_letter = bool(ascii_letter.match(before))
    if found := _LETTER_CHANGED.match(text, at):
        return found.end() if after_letter or ascii_letter.match(text, found.end()) else None
    found = _ENDING_CHANGED.match(text, at)
    return found.end() if found and after_letter else None


def find_coser_marks(text: str, taken: list[Span]) -> tuple[list[Tag], list[Span]]:
    """The marks that open or close a thought or an action, and the spans of stray `)` that stay in the text.

    Args:
        text: the message.
        taken: spans of tags of another dialect, in order; marks inside them are not marks.
    """
    tags: list[Tag] = []
    strays: list[Span] = []
    brackets = parens = skip = 0
    for match in _outside(_COSER.finditer(text), taken):
        start, end = match.span()
        sign = _WIDE.get(match.group(), match.group())
        if start < skip:
            continue
        if sign == "[" and (editorial := _editorial_end(text, start)):
            skip = editorial
            continue
        if sign in "[]":
            brackets = brackets + 1 if sign == "[" else max(brackets - 1, 0)
            kind, name, closing = Kind.ROLE_THINKING, "bracket", sign == "]"
        else:
            # A parenthesis inside a thought, and one inside an action, is part of its text.
            if brackets:
                continue
            closing = sign == ")"
            if closing and not parens:
                strays.append((start, end))
                continue
            parens += -1 if closing else 1
            if parens != (0 if closing else 1):
                continue
            kind, name = Kind.ROLE_ACTION, "parenthesis"
        tags.append(Tag(name, kind, start, end, closing=closing, wide=sign != match.group()))
    return tags, strays


def find_stars(text: str, taken: list[Span]) -> tuple[list[Tag], list[Span]]:
    """The stars that open or close an action, and the spans of stray ones that stay in the text.

    A star opens before a sign that is not blank and closes the open one; `**` is bold print, `2*3` and `2 * 3`
    are sums, `* ` begins a list item: all of these are text.
    """
    tags: list[Tag] = []
    strays: list[Span] = []
    is_open = False
    for match in _outside(_STARS.finditer(text), taken):
        start, end = match.span()
        before, after = text[start - 1 : start], text[end : end + 1]
        if end - start > 1 or (before.isdigit() and after.isdigit()):
            continue
        free_before, free_after = not before.strip(), not after.strip()
        if free_before and free_after:
            continue
        if not is_open and free_after:
            strays.append((start, end))
            continue
        wide = match.group() in _WIDE
        tags.append(Tag("star", Kind.ROLE_ACTION, start, end, closing=is_open, wide=wide))
        is_open = not is_open
    return tags, strays
