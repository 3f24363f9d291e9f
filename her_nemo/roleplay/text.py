"""Joining pieces of text where something between them was taken out, without running two words together."""

from __future__ import annotations

# The escapes are the full-width , ; : ! ? ( ) and the ideographic comma and full stop, and curly quotes.
_NO_BLANK_BEFORE = frozenset(",.;:!?)]}\u2026\uff0c\u3002\uff1b\uff1a\uff01\uff1f\u3001\uff09\u201d\u2019")
_NO_BLANK_AFTER = frozenset("([{\u201c\u2018\uff08")


def join_seam(left: str, right: str, *, collapse: bool = True) -> str:
    """`left` + `right` with blanks at the seam so that no two words join.

    Where both sides bring blanks, `collapse` leaves one: a blank line if there was one, else a line break,
    else a space. Without `collapse` the blanks stay as they are and one is added only where there is none.
    """
    if not left or not right:
        return left + right
    head, tail = left.rstrip(), right.lstrip()
    before, after = left[len(head) :], right[: len(right) - len(tail)]
    if before or after:
        if not (collapse and before and after):
            return left + right
        if "\n\n" in before or "\n\n" in after:
            return f"{head}\n\n{tail}"
        return f"{head}\n{tail}" if "\n" in before + after else f"{head} {tail}"
    if right[0] in _NO_BLANK_BEFORE or left[-1] in _NO_BLANK_AFTER:
        return left + right
    return f"{left} {right}"
