"""The four kinds of segment."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """What a part of a turn is. The value of a tagged kind is its tag name."""

    SYSTEM_THINKING = "system_thinking"
    ROLE_THINKING = "role_thinking"
    ROLE_ACTION = "role_action"
    SPEECH = "speech"

    @property
    def private(self) -> bool:
        """True for the two kinds of thought."""
        return self in (Kind.SYSTEM_THINKING, Kind.ROLE_THINKING)
