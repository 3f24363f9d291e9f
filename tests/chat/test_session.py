"""The conversation itself: what each model is told, what a person may do to turns, and what a person sees."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from her_nemo.chat.scenes import Scene, miniature_scenes
from her_nemo.chat.session import (
    Author,
    ChatSession,
    PlayedTurn,
    Shown,
    as_typed,
    pieces_of,
    pieces_so_far,
    user_text,
)
from her_nemo.config.errors import UserError
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.prompt import CONVERSATION_START, Utterance, render_utterance
from her_nemo.roleplay.views import Reader

REPLY = (
    "<system_thinking>Kit Holt should evade.</system_thinking>Kit Holt: <role_thinking>I hide the mask."
    "</role_thinking> <role_action>nods</role_action> Listen, the drum is mine."
)
LATER = REPLY.removeprefix("<system_thinking>Kit Holt should evade.</system_thinking>")
SAID = "Pia Penn: Tell me about the drum."


def contents(session: ChatSession, speaker: str) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in session.prompt_for(speaker)[1:]]


def test_the_model_is_told_its_own_thoughts_without_plans_and_nothing_hidden_of_others(session: ChatSession) -> None:
    assert session.prompt_for("Kit Holt")[0]["content"].startswith("You are Kit Holt from The Last Ferry.")
    assert contents(session, "Kit Holt") == [("user", CONVERSATION_START + SAID)]
    session.add("Kit Holt", REPLY)
    session.say("Pia Penn", "<role_thinking>He lies.</role_thinking>*frowns* Truly?")
    assert contents(session, "Kit Holt") == [
        ("user", CONVERSATION_START + SAID),
        ("assistant", LATER),
        ("user", "Pia Penn: <role_action>frowns</role_action> Truly?"),
    ]


def test_the_partner_is_told_what_can_be_seen_and_heard_even_of_himself(session: ChatSession) -> None:
    session.add("Kit Holt", REPLY)
    session.add("Pia Penn", "Pia Penn: <role_thinking>He lies.</role_thinking> Truly?")
    session.add("Kit Holt", REPLY)
    seen = "Kit Holt: <role_action>nods</role_action> Listen, the drum is mine."
    assert contents(session, "Pia Penn") == [
        ("user", CONVERSATION_START.strip() + "\n\n"),
        ("assistant", SAID),
        ("user", seen),
        ("assistant", "Pia Penn: Truly?"),
        ("user", seen),
    ]
    system = session.prompt_for("Pia Penn")[0]["content"]
    assert system.startswith("You are Pia Penn from The Last Ferry.")
    assert "Kit Holt acts calm. Kit Holt opens with Listen." in system  # his profile is no secret
    assert "mask" not in system
    assert "peace" not in system  # what he wants is


TAGS = [f"<{slash}{name}>" for name in ("role_thinking", "system_thinking", "role_action") for slash in ("", "/")]
MANGLED = [
    "<Role_Thinking>",
    "<think>",
    "</think>",
    "<role_thinking",
    "[role_thinking]",
    "<system_thinking >",
    "\uff1crole_thinking>",
]


def as_utterance(turn: PlayedTurn) -> Utterance:
    return Utterance(turn.speaker, turn.text)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([*TAGS, *MANGLED, "Kit Holt: ", " walks", "\n", "SECRET "]), max_size=12))
def test_no_thought_reaches_the_partner_however_it_is_written(parts: list[str]) -> None:
    text = "".join(parts)
    if not text.strip():
        return
    session = ChatSession.begin(miniature_scenes(1)[0], "Kit Holt", "s1")
    session.add("Kit Holt", text)
    session.add("Pia Penn", text.replace("Kit Holt", "Pia Penn"))
    told = "\n".join(message["content"] for message in session.prompt_for("Pia Penn")[1:])
    # A turn of nothing but a wrong name is shown to the person, who may mend it; nobody is told of it.
    noticed = [u for u in map(as_utterance, session.turns) if render_utterance(u, Reader.OTHER_CHARACTER)]
    visible = [piece.text for u in noticed for piece in pieces_of(u.speaker, u.text) if not piece.folded]
    assert told.count("SECRET") == sum(text.count("SECRET") for text in visible)
    assert "thinking" not in told.casefold()


def test_a_scene_begins_before_the_turn_that_the_model_is_to_give(shared_data) -> None:
    from her_nemo.chat.scenes import load_scenes

    scenes, bad = load_scenes([str(shared_data / "coser" / "king_lear.json")], 1)
    assert not bad
    session = ChatSession.begin(scenes[0], "Cordelia", "s1")
    assert [turn.speaker for turn in session.turns] == ["Environment", "King Lear", "Goneril"]
    assert session.next_speaker() == "Cordelia"
    heard = session.prompt_for("Cordelia")[1]["content"]
    assert "[I must know" not in heard
    assert "which daughter loves me most" not in heard  # King Lear's thought
    assert "which of you shall we say doth love us most?" in heard
    assert len(ChatSession.begin(scenes[0], "Cordelia", "s1", turns=0).turns) == 0
    with pytest.raises(UserError, match="has 14"):
        ChatSession.begin(scenes[0], "Cordelia", "s1", turns=99)
    with pytest.raises(UserError, match="King Lear, Goneril, Regan, Cordelia"):
        ChatSession.begin(scenes[0], "Hamlet", "s1")


def test_a_row_is_told_again_word_for_word(shared_data) -> None:
    import json

    from her_nemo.chat.scenes import scene_of_messages

    rows = [json.loads(line) for line in (shared_data / "her" / "sft_single_turn_sample.jsonl").open(encoding="utf-8")]
    for row in rows:
        scene = scene_of_messages(row["messages"], row["trace_id"])
        session = ChatSession.begin(scene, scene.parts[0].name, "s1")
        assert session.prompt_for(session.lead) == row["messages"][:-1]
    assert len(rows) == 95


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("Hello", "Pia Penn: Hello"),
        ("*bows* Hello", "Pia Penn: <role_action>bows</role_action> Hello"),
        ("Listen: go", "Pia Penn: Listen: go"),
        ("Pia Penn: Hello", "Pia Penn: Hello"),
        ("2 * 3 is 6", "Pia Penn: 2 * 3 is 6"),
        ("<role_thinking>So.</role_thinking> Hello", "Pia Penn: <role_thinking>So.</role_thinking> Hello"),
        (
            "<system_thinking>She greets.</system_thinking>Hello",
            "<system_thinking>She greets.</system_thinking>Pia Penn: Hello",
        ),
        ("<role_thinking>lost the end", None),
        ("   ", None),
        ("a <|im_end|> b", None),
        ("\ud83d", None),
    ],
)
def test_what_is_typed(typed: str, text: str | None) -> None:
    if text is None:
        with pytest.raises(UserError):
            as_typed("Pia Penn", typed)
    else:
        assert as_typed("Pia Penn", typed) == text


def test_candidates_edits_and_going_back(session: ChatSession) -> None:
    number = session.add("Kit Holt", REPLY)
    assert session.add_alternative(number, REPLY.replace("mine", "yours")) == 1
    session.say("Pia Penn", "So?")
    later = session.add("Kit Holt", REPLY)
    session.add_alternative(later, REPLY.replace("mine", "gone"))
    assert [len(turn.candidates) for turn in session.turns] == [1, 2, 1, 2]
    session.choose(number, 0)  # what followed answered another text: its own alternatives go
    assert [len(turn.candidates) for turn in session.turns] == [1, 2, 1, 1]
    assert session.turns[3].text.endswith("gone.")
    session.edit(number, "<role_action>shrugs</role_action> No.")
    assert session.turns[number].text == "Kit Holt: <role_action>shrugs</role_action> No."
    assert session.turns[number].candidate.author is Author.EDIT
    assert session.edit(number, session.turns[number].text) == 2  # nothing changed: no new text
    assert len(session.turns[number].candidates) == 3
    session.rewind(1)
    assert [turn.text for turn in session.turns] == [SAID]
    revision = session.revision
    with pytest.raises(UserError):
        session.rewind(5)
    with pytest.raises(UserError):
        session.choose(0, 1)
    with pytest.raises(UserError):
        session.edit(0, " ")
    with pytest.raises(UserError):
        session.add("Kit Holt", "\n")
    assert session.revision == revision


def test_whose_turn_it_is(session: ChatSession) -> None:
    assert session.others == ("Pia Penn",)
    assert session.next_speaker() == "Kit Holt"
    session.add("Kit Holt", REPLY)
    assert session.next_speaker() == "Pia Penn"
    session.say("environment", "*Rain falls.*")
    assert session.others == ("Pia Penn", "environment")
    session.add("Kit Holt", REPLY)
    assert session.next_speaker() == "environment"
    assert session.spelt("kit  holt") == "Kit Holt"
    for name in ("", "a:b", "x" * 61, "<b>"):
        with pytest.raises(UserError):
            session.spelt(name)


def test_folded_is_what_the_users_view_hides() -> None:
    pieces = pieces_of("Kit Holt", REPLY)
    assert [(piece.kind, piece.folded) for piece in pieces] == [
        (Kind.SYSTEM_THINKING, True),
        (Kind.ROLE_THINKING, True),
        (Kind.ROLE_ACTION, False),
        (Kind.SPEECH, False),
    ]
    assert user_text("Kit Holt", REPLY) == "Kit Holt: *nods* Listen, the drum is mine."


def test_a_name_that_is_not_the_speakers_is_shown() -> None:
    pieces = pieces_of("Kit Holt", "<system_thinking>p</system_thinking>Pia Penn: I am Kit.")
    assert [piece.text for piece in pieces] == ["p", "Pia Penn:", "I am Kit."]
    assert [piece.folded for piece in pieces] == [True, False, False]


def test_while_a_reply_comes_in_no_piece_of_a_tag_or_name_shows() -> None:
    open_pieces: list[list[Shown]] = []
    for end in range(len(REPLY) + 1):
        pieces = pieces_so_far("Kit Holt", REPLY[:end])
        visible = " ".join(piece.text for piece in pieces if not piece.folded)
        assert "<" not in visible
        assert "thinking" not in visible
        assert not visible.startswith("Kit")
        assert "mask" not in visible
        open_pieces.append(pieces)
    assert open_pieces[-1] == pieces_of("Kit Holt", REPLY)
    assert open_pieces[30] == [Shown(Kind.SYSTEM_THINKING, "Kit Holt shou")]


def test_miniature_scenes_are_of_characters_that_training_does_not_know(scene: Scene) -> None:
    from her_nemo.data.miniature import make_splits

    train, held_out = make_splits(0)
    made = miniature_scenes(24)
    assert len({each.scene_id for each in made}) == 24
    for each in made:
        assert each.parts[0].name in held_out.names
        assert each.parts[0].name not in train.names
    assert made[0] == scene


def test_the_same_text_again_is_no_other_text(session: ChatSession) -> None:
    session.add("Kit Holt", REPLY)
    assert session.add_alternative(1, "Kit Holt: No.", finished=False) == 1
    assert session.add_alternative(1, "Kit Holt: No.") == 2  # now it is whole
    with pytest.raises(UserError, match=r"wrote text 1 again, word for word: a higher sampling\.temperature"):
        session.add_alternative(1, f"{REPLY}\n")
    assert len(session.turns[1].candidates) == 3
    assert session.turns[1].text == "Kit Holt: No."
