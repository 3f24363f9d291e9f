"""Comparing names of characters and books. What is compared is never shown: texts keep the name as written."""

from __future__ import annotations

import re
import unicodedata

_STRAIGHT = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u2032": "'", "`": "'", "\u201c": '"', "\u201d": '"'}
)
_BLANKS = re.compile(r"\s+")


def normalise_name(name: str) -> str:
    """`name` for comparison: straight quotes, NFKC, single blanks, case folded."""
    text = unicodedata.normalize("NFKC", name.translate(_STRAIGHT)).translate(_STRAIGHT)
    return _BLANKS.sub(" ", text).strip().casefold()
