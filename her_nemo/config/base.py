"""What every section of the configuration is made with."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of every section: unknown keys forbidden, types strict, values fixed after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def knob(default: Any, description: str, **limits: Any) -> Any:
    """A key with a default and one sentence about it."""
    return Field(default=default, description=description, **limits)


def required(description: str, **limits: Any) -> Any:
    """A key without a default: the user has to give it."""
    return Field(description=description, **limits)


def changed(section: Section) -> set[str]:
    """Keys of a section that are not at their defaults."""
    return {name for name, info in type(section).model_fields.items() if getattr(section, name) != info.default}
