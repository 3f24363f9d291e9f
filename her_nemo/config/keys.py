"""The keys of a schema as a user meets them: which there are, their defaults and their types in plain words."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from her_nemo.config import compose

REQUIRED = "<required>"
_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
_LIMITS = (
    ("gt", "more than"),
    ("ge", "at least"),
    ("lt", "less than"),
    ("le", "at most"),
    ("pattern", "written as"),
)


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that holds a value, with the default its section gives it."""
    for name, info in section.model_fields.items():
        inner = compose.subsection(info.annotation)
        if inner is None:
            yield prefix + name, info
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def default(info: FieldInfo) -> Any:
    """The default of a key, or REQUIRED."""
    found = info.get_default(call_default_factory=True)
    return REQUIRED if found is PydanticUndefined else found


def shown(value: Any) -> str:
    """A value as one would type it."""
    return json.dumps(value) if not isinstance(value, str) else value


def type_of(info: FieldInfo) -> str:
    """The type of a key in plain words, with its limits: `whole number, at least 0`."""
    return _type(info.annotation, info.metadata)


def _type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *limits = arguments
        # pydantic's Field in an Annotated carries its limits inside.
        flat = [
            part for limit in limits for part in (limit.metadata if isinstance(limit, FieldInfo) else [limit])
        ]
        return _type(inner, [*flat, *metadata])
    if origin in (Union, types.UnionType):
        text = " or ".join(dict.fromkeys(_type(part) for part in arguments))
    elif origin is Literal:
        text = "one of " + ", ".join(shown(value) for value in arguments)
    elif origin is list:
        text = f"list of {_type(arguments[0])}"
    elif origin is dict:
        text = f"{_type(arguments[1])} by name"
    else:
        text = _PLAIN.get(annotation) or getattr(annotation, "__name__", str(annotation))
    limits = [
        f"{word} {getattr(limit, name)}"
        for limit in metadata
        for name, word in _LIMITS
        if getattr(limit, name, None) is not None
    ]
    return ", ".join([text, *limits])
