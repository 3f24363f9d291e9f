"""Comparing names of characters and books. What is compared is never shown: texts keep the name as written."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# Left and right single and double quotes, low quotes, primes, the grave and acute accents on their own, and
# the modifier letters that are typed for an apostrophe.
_QUOTES = {ord(sign): "'" for sign in "\u2018\u2019\u201a\u201b\u2032\u00b4`\u02bc\u02bb\u02b9\uff07"}
_QUOTES |= {ord(sign): '"' for sign in "\u201c\u201d\u201e\u201f\u2033\uff02"}
_DASHES = {ord(sign): "-" for sign in "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d"}
_BLANKS = re.compile(r"\s+")


@lru_cache(maxsize=4096)
def normalise_name(name: str) -> str:
    """`name` for comparison: NFKC, straight quotes and dashes, no invisible signs, single spaces, case folded.

    >>> normalise_name(" D\u2019Artagnan\u00a0 the  Elder ")
    "d'artagnan the elder"
    """
    # NFKC turns an acute accent on its own into a space and a combining sign: quotes go first.
    text = unicodedata.normalize("NFKC", name.translate(_QUOTES))
    text = text.casefold().translate(_QUOTES | _DASHES)
    text = "".join(sign for sign in text if unicodedata.category(sign) != "Cf")
    return unicodedata.normalize("NFKC", _BLANKS.sub(" ", text).strip())


def same_name(one: str, other: str) -> bool:
    """Whether two spellings are the same name."""
    return one == other or normalise_name(one) == normalise_name(other)
