"""Taking typed fields out of raw rows; what is missing or of another type becomes `Malformed`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from her_nemo.data.readers.rows import Malformed
from her_nemo.roleplay.prompt import CONTROL_TOKENS

LARGEST = 2**31  # of an index; Parquet has them in 32 bits
Wanted = TypeVar("Wanted")
_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number"}


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """`value` if it is an object."""
    if not isinstance(value, dict):
        raise Malformed("not_an_object", f"{what} is {kind_of(value)}, not an object")
    return value


def field(row: Mapping[str, Any], key: str, wanted: type[Wanted], what: str = "") -> Wanted:
    """row[key], of the wanted type."""
    name = f"{what}.{key}" if what else key
    if key not in row:
        raise Malformed("missing_key", f"no key {name!r} (keys: {', '.join(map(str, row)) or 'none'})")
    value = row[key]
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise Malformed("wrong_type", f"{name!r} is {kind_of(value)}, not {_NAMES[wanted]}")
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise Malformed("wrong_type", f"{name!r} is {value}, too large a number")
    return value


def text(row: Mapping[str, Any], key: str, what: str = "") -> str:
    """row[key] as text that can be encoded and cannot forge the borders of a message."""
    return checked(field(row, key, str, what), f"{what}.{key}" if what else key)


def optional_text(row: Mapping[str, Any], *keys: str) -> str:
    """The first of `keys` that holds text which is not blank; '' when none does."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            return value
    return ""


def optional_index(row: Mapping[str, Any], *keys: str) -> int | None:
    """The first of `keys` that holds a whole number."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST:
            return value
    return None


def checked(value: str, where: str) -> str:
    """`value` unless it has a lone surrogate or one of the chat template's own tokens."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Malformed("bad_encoding", f"{where} has a lone surrogate: not valid text") from None
    for token in CONTROL_TOKENS:
        if token in value:
            raise Malformed("control_token", f"{where} contains {token}, which ends or begins a message")
    return value


def check_texts(value: Any, where: str = "") -> None:
    """`checked` for every text inside a value, wherever it stands.

    Raises:
        Malformed: at the first that is not fit to be written.
    """
    if isinstance(value, str):
        checked(value, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_texts(item, f"{where}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_texts(item, f"{where}[{index}]")


def length(value: Any) -> int:
    """How many entries a list has; 0 for anything else."""
    return len(value) if isinstance(value, list) else 0


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    return _NAMES.get(type(value), f"a {type(value).__name__}")
