"""CoSER's own formats: a book's JSON and the test set (Wang et al. 2025, arXiv 2502.09082)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from her_nemo.data.readers import fields
from her_nemo.data.readers.items import Read, ReadOptions
from her_nemo.data.readers.rows import Malformed, Place, RawRow, Rejected
from her_nemo.data.records import Character, Conversation, ConversationTurn
from her_nemo.roleplay.dialects import Dialect, parse_message, to_her
from her_nemo.roleplay.names import normalise_name
from her_nemo.roleplay.turn import Defect

ENVIRONMENT = "Environment"
_GAPS = re.compile(r"[_\s]+")
# Who speaks, and the plan, stand in fields of their own.
_NOT_HERE = frozenset((Defect.MISSING_PLAN, Defect.MISSING_NAME, Defect.WRONG_NAME))


# ---------------------------------------------------------------- a book


def is_book(value: Any) -> bool:
    """A CoSER book: an object with plots, and the profiles in character_datasets."""
    return isinstance(value, dict) and isinstance(value.get("plots"), list) and "character_datasets" in value


def count_book(value: Any) -> int:
    """Dialogue entries of all conversations of all plots."""
    listed = value.get("plots") if isinstance(value, dict) else None
    plots = [plot for plot in _list(listed) if isinstance(plot, dict)]
    conversations = [c for plot in plots for c in _list(plot.get("conversation")) if isinstance(c, dict)]
    return sum(fields.length(conversation.get("dialogues")) for conversation in conversations)


def read_book(row: RawRow, options: ReadOptions) -> Read:
    """Every conversation of every plot. Plots from `split_plot_index` on are CoSER's own test plots."""
    try:
        book = fields.mapping(row.value, "a book")
        plots = fields.field(book, "plots", list)
    except Malformed as problem:
        yield Rejected.of(row.place, problem, 0, row.value)
        return
    name = options.book or _book_name(book, row.place)
    profiles = _book_profiles(book.get("character_datasets"))
    held_out_from = fields.optional_index(book, "split_plot_index")
    for index, plot in enumerate(plots):
        place = row.place.down("plots", index)
        if not isinstance(plot, dict):
            message = f"a plot is {fields.kind_of(plot)}, not an object"
            yield Rejected(place, "not_an_object", message, 0, plot)
            continue
        conversations = plot.get("conversation")
        if not isinstance(conversations, list):
            message = f"'conversation' is {fields.kind_of(conversations)}, not a list"
            yield Rejected(place, "wrong_type", message, 0, plot)
            continue
        for number, conversation in enumerate(conversations):
            where = place.down("conversation", number)
            try:
                yield where, _conversation(
                    fields.mapping(conversation, "a conversation"),
                    source="coser",
                    book=name,
                    plot=plot,
                    plot_index=index,
                    conversation_index=number,
                    profiles=profiles,
                    held_out=held_out_from is not None and index >= held_out_from,
                    options=options,
                )
            except Malformed as problem:
                yield rejected(where, problem, conversation)


def _book_name(book: Mapping[str, Any], place: Place) -> str:
    """The book's name: a field if there is one, else the file's name (king_lear.json -> King Lear)."""
    given = fields.optional_text(book, "book", "book_name", "title")
    if given:
        return given
    name = _GAPS.sub(" ", Path(place.file).stem).strip()
    return name.title() if name == name.lower() else name


def _book_profiles(datasets: Any) -> dict[str, str]:
    if not isinstance(datasets, dict):
        return {}
    return {
        name: fields.optional_text(entry, "profile", "character_profile")
        for name, entry in datasets.items()
        if isinstance(entry, dict)
    }


# ---------------------------------------------------------------- the test set


def is_test_case(value: Any) -> bool:
    """A case of CoSER's test_set.json: a conversation with its plot and profiles beside it."""
    return isinstance(value, dict) and "dialogues" in value and "plot" in value and "character_profiles" in value


def count_test_case(value: Any) -> int:
    """Dialogue entries."""
    return fields.length(value.get("dialogues")) if isinstance(value, dict) else 0


def read_test_case(row: RawRow, options: ReadOptions) -> Read:
    """One conversation, held out."""
    try:
        case = fields.mapping(row.value, "a test case")
        plot = fields.field(case, "plot", dict)
        profiles = fields.field(case, "character_profiles", dict)
        yield row.place, _conversation(
            case,
            source="coser_test",
            book=options.book or fields.text(case, "book"),
            plot=plot,
            plot_index=fields.optional_index(case, "i_p"),
            conversation_index=fields.optional_index(case, "i_c"),
            profiles={name: text for name, text in profiles.items() if isinstance(text, str)},
            held_out=True,
            options=options,
        )
    except Malformed as problem:
        yield rejected(row.place, problem, row.value)


# ---------------------------------------------------------------- what both share


def rejected(place: Place, problem: Malformed, conversation: Any) -> Rejected:
    """A conversation that cannot be used, with all its turns."""
    turns = fields.length(conversation.get("dialogues")) if isinstance(conversation, dict) else 0
    return Rejected.of(place, problem, turns, conversation)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _conversation(
    conversation: Mapping[str, Any],
    *,
    source: str,
    book: str,
    plot: Mapping[str, Any],
    plot_index: int | None,
    conversation_index: int | None,
    profiles: Mapping[str, str],
    held_out: bool,
    options: ReadOptions,
) -> Conversation:
    """A conversation of a book or of the test set: both keep scenario, topic, characters and dialogues alike."""
    dialogues = fields.field(conversation, "dialogues", list)
    if not dialogues:
        raise Malformed("empty_conversation", "'dialogues' is empty")
    chapter = fields.optional_text(plot, "chapter")
    cast = Cast(key_characters(conversation, plot, profiles))
    dialect = options.dialect or Dialect.COSER
    turns = tuple(
        _turn(fields.mapping(entry, f"dialogues[{index}]"), f"dialogues[{index}]", cast, dialect)
        for index, entry in enumerate(dialogues)
    )
    return Conversation(
        conversation_id=trace_id(book, chapter, plot_index, plot.get("i_chunk"), conversation_index),
        source=source,
        book=book,
        plot_index=plot_index,
        conversation_index=conversation_index,
        scenario=fields.optional_text(conversation, "scenario"),
        topic=fields.optional_text(conversation, "topic"),
        background=fields.optional_text(plot, "summary"),
        characters=cast.with_speakers(turns, profiles),
        turns=turns,
        chapter=chapter,
        source_text=fields.optional_text(plot, "text"),
        held_out=held_out,
    )


def trace_id(book: str, chapter: str, plot: int | None, chunk: Any, conversation: int | None) -> str:
    """The conversation's name as HER writes it: BOOK_CHAPTER_PLOT_CHUNK_CONVERSATION."""
    return "_".join(str(part) for part in (book, chapter, plot, chunk, conversation) if part not in (None, ""))


def key_characters(
    conversation: Mapping[str, Any], plot: Mapping[str, Any], profiles: Mapping[str, str]
) -> list[Character]:
    """The key characters with motivation (older files say `thought`) and profile; the Environment is none.

    Raises:
        Malformed: if there is no list of them, or one has no name.
    """
    described = {
        normalise_name(entry["name"]): fields.optional_text(entry, "description")
        for entry in _list(plot.get("key_characters"))
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    }
    by_name = {normalise_name(name): profile for name, profile in profiles.items()}
    characters: list[Character] = []
    for index, entry in enumerate(fields.field(conversation, "key_characters", list)):
        what = f"key_characters[{index}]"
        name = fields.text(fields.mapping(entry, what), "name", what).strip()
        if normalise_name(name) == normalise_name(ENVIRONMENT):
            continue
        motivation = fields.optional_text(entry, "motivation", "thought")
        profile = by_name.get(normalise_name(name)) or described.get(normalise_name(name), "")
        characters.append(Character(name, profile, motivation))
    return characters


class Cast:
    """One spelling per character: the key character's, else the first one seen."""

    def __init__(self, characters: list[Character]) -> None:
        self.characters = characters
        self._spelling = {normalise_name(character.name): character.name for character in reversed(characters)}

    def canonical(self, name: str) -> str:
        """The spelling to use for `name`."""
        return self._spelling.setdefault(normalise_name(name), name.strip())

    def with_speakers(
        self, turns: tuple[ConversationTurn, ...], profiles: Mapping[str, str]
    ) -> tuple[Character, ...]:
        """The key characters, then the others who speak and have a profile."""
        known = {normalise_name(character.name) for character in self.characters}
        by_name = {normalise_name(name): profile for name, profile in profiles.items() if profile}
        others = dict.fromkeys(turn.speaker for turn in turns if normalise_name(turn.speaker) not in known)
        extra = [
            Character(name, by_name[normalise_name(name)], key=False)
            for name in others
            if normalise_name(name) in by_name
        ]
        return (*self.characters, *extra)


def _turn(entry: Mapping[str, Any], what: str, cast: Cast, dialect: Dialect) -> ConversationTurn:
    speaker = cast.canonical(fields.text(entry, "character", what))
    if not speaker:
        raise Malformed("missing_name", f"{what}.character is blank")
    return turn_of(speaker, fields.text(entry, "message", what), dialect)


def turn_of(speaker: str, message: str, dialect: Dialect, plan: str = "") -> ConversationTurn:
    """One message of a dialect as a turn of a conversation, with what was wrong with it.

    A text in HER's tags is kept as it is, mended by nobody; a plan inside it is taken out when `plan` is blank.
    """
    message = message.strip()
    parsed = parse_message(message, dialect, expect_name=speaker)
    defects = tuple(defect.value for defect in parsed.defects if defect not in _NOT_HERE)
    if parsed.plan:
        plan = plan or parsed.plan
        text = to_her(message, dialect).removeprefix(f"{speaker}:").strip()
        return ConversationTurn(speaker, text, plan, defects)
    if parsed.name == speaker and parsed.name_span is not None:
        message = message[parsed.name_span[1] :].strip()
    text = message if dialect is Dialect.HER else to_her(message, dialect)
    return ConversationTurn(speaker, text, plan.strip() or None, defects)
