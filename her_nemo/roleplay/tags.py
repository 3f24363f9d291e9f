"""Finding tags in a message, exact or mangled.

An exact tag is `<system_thinking>`, `<role_thinking>`, `<role_action>` or its close. Everything that looks
like an attempt at a thinking tag (`<Role_Thinking>`, `<think>`, `[role_thinking]`, `<role_thinking` without
its end) is also a tag, so that what follows it is kept private. Other tags (`<b>`) are text, reported as
unknown.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from difflib import SequenceMatcher

from her_nemo.roleplay.kinds import Kind

# Repeats are bounded so that no text takes more than linear time.
_TAG = re.compile(
    r"""  # \uff1c and \uff1e are the full-width < and >
    [<\uff1c] \s{0,9} (?P<slash>[/\\]?) \s{0,9}
    (?P<name>[^\s<>\uff1c\uff1e/\\]{1,60})
    (?P<rest> \s{0,9} /? \s{0,9} [>\uff1e] | \s [^<>\uff1c\uff1e]{0,80} [>\uff1e] | )
    |
    (?P<bare_slash>[/\\]\s{0,9})? (?P<bare>(?:system|role)[_\-\u200b\u00ad]?thinking)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_ORDINARY = re.compile(r"[A-Za-z][\w\-]*\Z")
_ACTION = re.compile(r"role[_\-]?action", re.IGNORECASE)

_KNOWN = {
    "systemthinking": Kind.SYSTEM_THINKING,
    "rolethinking": Kind.ROLE_THINKING,
    "roleaction": Kind.ROLE_ACTION,
}
_THOUGHT_NAMES = frozenset(
    (
        "plan",
        "planning",
        "reason",
        "reasoning",
        "reflection",
        "inner",
        "scratchpad",
        "analysis",
        "cot",
    )
)
_LONG_NAMES = ("systemthinking", "rolethinking", "thinking", "thought")


@dataclass(frozen=True)
class Tag:
    """One tag at [start, end). `name` has letters only, in lower case."""

    name: str
    kind: Kind
    start: int
    end: int
    closing: bool
    wrong_case: bool = False
    malformed: bool = False
    unknown: bool = False
    wide: bool = False  # a mark of another dialect, written full-width
    closes: bool = True  # False: a close too mangled to be trusted to end a thought


def _letters(name: str) -> str:
    folded = unicodedata.normalize("NFKC", name).casefold()
    return "".join(char for char in folded if char.isalpha())


def _thought_kind(letters: str) -> Kind | None:
    """The kind of a name that might mean thinking; without "role" in it, it may be a plan (more private)."""
    might = "think" in letters or "thought" in letters or "monolog" in letters
    might = might or letters in _THOUGHT_NAMES
    might = might or letters.startswith(("rolet", "syst"))
    if not might and len(letters) >= 7:
        ratios = (SequenceMatcher(None, letters, known, autojunk=False).ratio() for known in _LONG_NAMES)
        might = max(ratios) >= 0.8
    if not might:
        return None
    return Kind.ROLE_THINKING if "role" in letters else Kind.SYSTEM_THINKING


def find_tags(text: str) -> tuple[list[Tag], list[tuple[int, int]]]:
    """All tags in order, and the spans of unknown tags that stay in the text."""
    tags: list[Tag] = []
    unknown: list[tuple[int, int]] = []
    position = 0
    while found := _TAG.search(text, position):
        tag = _bare(found) if found.group("bare") else _angled(found)
        if tag is None:
            if found.group("rest") and _ORDINARY.match(found.group("name")):
                unknown.append(found.span())
            # Only the bracket is passed over: a real tag may begin inside what this match took in.
            position = found.start() + 1
            continue
        tags.append(tag)
        position = tag.end
    return tags, unknown


def _bare(found: re.Match[str]) -> Tag:
    """`role_thinking` outside a tag of its own, as in `[role_thinking]` or `&lt;role_thinking&gt;`."""
    letters = _letters(found.group("bare"))
    closing = bool(found.group("bare_slash"))
    return Tag(
        letters,
        _KNOWN[letters],
        *found.span(),
        closing=closing,
        malformed=True,
        closes=False,
    )


def _angled(found: re.Match[str]) -> Tag | None:
    raw, closing = found.group("name"), bool(found.group("slash"))
    letters = _letters(raw)
    squeezed = re.sub(r"\s", "", found.group())
    kind = _KNOWN.get(letters)
    if kind is not None:
        written = f"</{kind.value}>" if closing else f"<{kind.value}>"
        if squeezed.casefold() == written:
            wrong_case, malformed = squeezed != written, squeezed != found.group()
            return Tag(
                letters,
                kind,
                *found.span(),
                closing=closing,
                wrong_case=wrong_case,
                malformed=malformed,
            )
    action = _ACTION.match(raw)
    if action and "thin" not in letters and "thought" not in letters:
        # The tag ends with its name: what follows inside the brackets may be the action itself.
        end = found.start("name") + action.end()
        return Tag(
            "roleaction",
            Kind.ROLE_ACTION,
            found.start(),
            end,
            closing=closing,
            malformed=True,
        )
    kind = kind or _thought_kind(letters)
    if kind is None:
        return None
    # Clean brackets around an odd spelling are still a tag, and its close ends it; anything else does not.
    clean = found.group() == f"<{'/' if closing else ''}{raw}>"
    unknown = letters not in _KNOWN
    span = found.span()
    return Tag(
        letters,
        kind,
        *span,
        closing=closing,
        malformed=not (clean and unknown),
        unknown=unknown,
        closes=clean,
    )
