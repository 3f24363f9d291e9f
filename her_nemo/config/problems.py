"""From pydantic's errors to problems a user can act on: what was given, what is wanted, who set it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from her_nemo.config.errors import Problem, nearest

# The message for a required key that was not given; config/partial.py looks for it.
MISSING = "has to be given"

# pydantic's error types -> what is wanted, in plain words. {name} is filled from the error's context.
WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (quote it if it looks like a number)",
    "list_type": "a list, e.g. [a,b]",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "none_required": "null",
    "literal_error": "one of {expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "too_short": "a list of {min_length}",
    "too_long": "a list of {max_length}",
}
KINDS = {
    bool: "true/false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a section",
}


def from_validation(error: ValidationError, known: list[str], who_set: Callable[[str], str]) -> list[Problem]:
    """One problem per key. A union's branches fail one by one; they are joined with "or"."""
    by_key: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        by_key.setdefault(_dotted(item["loc"], known), []).append(item)
    return [_problem(key, items, known, who_set(key)) for key, items in by_key.items()]


def _dotted(location: tuple[int | str, ...], known: list[str]) -> str:
    """The key of an error. pydantic ends the location of a union's branch with that branch's type: left out."""
    parts: list[str] = []
    for part in location:
        here = ".".join(parts)
        is_leaf = here in known and not any(key.startswith(here + ".") for key in known)
        if is_leaf:
            break
        parts.append(str(part))
    return ".".join(parts)


def _problem(key: str, items: list[Any], known: list[str], where: str) -> Problem:
    first = items[0]
    given = first["input"]
    if first["type"] == "extra_forbidden":
        close = nearest(key, known)
        return Problem(key, "no such key", where, f"did you mean {close}?" if close else "")
    if first["type"] == "missing" or given == "???":
        return Problem(key, MISSING, "", f"add {key}=... to the command line")
    wanted: list[str] = []
    for item in items:
        words = _wanted(item)
        if words not in wanted:
            wanted.append(words)
    return Problem(key, f"given {_shown(given)}, wanted {' or '.join(wanted)}", where)


def _wanted(item: Any) -> str:
    template = WANTED.get(item["type"])
    return template.format(**item.get("ctx", {})) if template else str(item["msg"])


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    kind = KINDS.get(type(value), type(value).__name__)
    return f"{text} ({kind})"
