"""One reader per format, and telling which one a file needs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.data.readers import aligner, coser, her, messages, own
from her_nemo.data.readers.items import Format
from her_nemo.data.readers.rows import RawRow

# In the order of recognition: the more particular first.
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        format_.name: format_
        for format_ in (
            Format("coser_book", "conversations", coser.is_book, coser.count_book, coser.read_book),
            Format("coser_test", "conversations", coser.is_test_case, coser.count_test_case, coser.read_test_case),
            Format("her_full", "conversations", her.is_full, her.count_full, her.read_full),
            Format("conversations", "conversations", own.is_own, own.count_own, own.read_own),
            Format("her_single_turn", "views", her.is_single, messages.count_messages, her.read_single),
            Format("her_multi_turn", "views", her.is_multi, messages.count_messages, her.read_multi),
            Format("messages", "views", messages.is_messages, messages.count_messages, messages.read_messages),
            Format("coser_sharegpt", "views", messages.is_sharegpt, messages.count_messages, messages.read_sharegpt),
            Format("aligner_sft", "views", aligner.is_sft, aligner.count_sft, aligner.read_sft),
            Format("aligner_rm", "pairs", aligner.is_rm, aligner.count_rm, aligner.read_rm, rows_per_item=2),
        )
    }
)
# What `source` may say: a family, in which the format is told by the rows, or one format.
FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "auto": tuple(FORMATS),
        "coser": tuple(name for name in FORMATS if name.startswith("coser")),
        "her": tuple(name for name in FORMATS if name.startswith("her")),
        "aligner": tuple(name for name in FORMATS if name.startswith("aligner")),
        **{name: (name,) for name in FORMATS},
    }
)


def recognise(value: Any, source: str) -> Format | None:
    """The format of `source` that a raw row's value is of; a `source` that is one format is believed."""
    names = FAMILIES[source]
    if len(names) == 1:
        return FORMATS[names[0]]
    return next((FORMATS[name] for name in names if FORMATS[name].looks_like(value)), None)


def unknown_format(row: RawRow, source: str) -> UserError:
    """What to say of a file of which no row is recognised."""
    value = row.value
    seen = f"keys {', '.join(map(repr, list(value)[:12]))}" if isinstance(value, dict) else f"a {type(value).__name__}"
    return UserError(
        f"{row.place.file}: not a format that source={source} knows ({seen}); the formats are "
        + ", ".join(FAMILIES[source])
    )
