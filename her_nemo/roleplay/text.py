"""Joining pieces of text where something between them was taken out, without running two words together."""

from __future__ import annotations

import re

# The escapes are the full-width , ; : ! ? ( ) and the ideographic comma and full stop, and curly quotes.
_NO_BLANK_BEFORE = frozenset(",.;:!?)]}\u2026\uff0c\u3002\uff1b\uff1a\uff01\uff1f\u3001\uff09\u201d\u2019")
_NO_BLANK_AFTER = frozenset("([{\u201c\u2018\uff08")
# A name in angle brackets that has not ended yet: glued to what follows it could become a tag.
_OPEN_ANGLE = re.compile(r"[<\uff1c][^\s<>\uff1c\uff1e]*\Z")
_LOOSE_ANGLE = re.compile(r"[<\uff1c\s]*[<\uff1c]\s*\Z")


def join_cut(left: str, right: str) -> str:
    """`left` + `right` where a tag was cut out between them; blanks stay.

    A bracket that stood directly before the tag (`<<role_action>`) goes with it: it would make a tag of what
    comes after.
    """
    if left and right and (loose := _LOOSE_ANGLE.search(left)):
        left = left[: loose.start()] + (" " if loose.start() and not right[0].isspace() else "")
    return join_seam(left, right, collapse=False)


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
    if (right[0] in _NO_BLANK_BEFORE or left[-1] in _NO_BLANK_AFTER) and not _OPEN_ANGLE.search(left[-80:]):
        return left + right
    return f"{left} {right}"
