"""A conversation between the policy and a simulator: what each side sees, for good turns and for mangled ones.

Thoughts and plans of the policy are in lower-case Greek letters, those of the simulator in upper-case ones, all else
in Latin letters: a leak is a letter of the wrong alphabet.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from her_nemo.roleplay.dialects import Dialect
from her_nemo.roleplay.dialogue import SILENCE, Conversation, Start, read_start, without_control_tokens
from her_nemo.roleplay.layouts import COSER_REQUIREMENTS, Layout, RolePrompt
from her_nemo.roleplay.prompt import CONVERSATION_START, Utterance, build_messages

GREEK, UPPER = re.compile(r"[\u03b1-\u03c9]"), re.compile(r"[\u0391-\u03a9]")
HISTORY = (
    Utterance("Bo", "Bo: Good day.\n\nThe door is open."),
    Utterance("Ada", "<system_thinking>σ</system_thinking>Ada: <role_thinking>θ</role_thinking> Come in."),
    Utterance("Cy", "Cy: <role_action>waves</role_action>"),
    Utterance("Bo", "Bo: What now?"),
)
PROMPT = RolePrompt(
    name="Ada", book="Salt", profile="Ada hides πσ.", background="A cold day.", scenario="The inn.",
    others=(("Bo", "Bo is a cousin."), ("Cy", "Cy is a stranger.")), inner_thoughts="I want ω.",
    description="δ", experience="ε",
)  # fmt: skip


def start(layout: Layout = Layout.HER, **given) -> Start:
    return read_start("t", build_messages(PROMPT, "Ada", HISTORY, layout), **given)


def roles(messages) -> str:
    return "".join(message["role"][0] for message in messages)


def everything(messages) -> str:
    return "\n".join(message["content"] for message in messages)


@pytest.mark.parametrize("layout", list(Layout))
def test_a_start_is_read_from_the_prompt(layout: Layout) -> None:
    seen = start(layout)
    assert (seen.me, seen.partner, seen.layout) == ("Ada", "Bo", layout)
    assert [said.speaker for said in seen.history] == ["Bo", "Ada", "Cy", "Bo"]
    asked = Conversation(seen).partner_messages()
    # Bo opened, Ada and Cy spoke, Bo spoke: his turn comes after Ada's.
    assert roles(asked) == "suaua"
    action = "(waves)" if layout is Layout.COSER else "<role_action>waves</role_action>"
    assert asked[3]["content"] == f"Ada: Come in.\n\nCy: {action}"
    assert asked[2]["content"] == "Bo: Good day.\n\nThe door is open."
    assert "You are" in asked[0]["content"]
    assert "Bo is a cousin." in asked[0]["content"]
    assert not GREEK.search(everything(asked)), "the policy's profile, inner thoughts or turns leak"


def test_each_side_reads_its_own_view() -> None:
    talk = Conversation(start())
    before = list(talk.messages)
    talk.say(
        "<system_thinking>Ada πλ</system_thinking>Ada: <role_thinking>θ</role_thinking> "
        "<role_action>nods</role_action> Yes."
    )
    talk.hear("Bo: <role_thinking>ΘΘ</role_thinking> Then <role_action>sits</role_action> come.")
    assert talk.messages[: len(before)] == before
    assert talk.messages[-2:] == [
        {"role": "assistant",
         "content": "Ada: <role_thinking>θ</role_thinking> <role_action>nods</role_action> Yes."},
        {"role": "user", "content": "Bo: Then <role_action>sits</role_action> come."},
    ]  # fmt: skip
    assert [m["content"] for m in talk.partner_messages()[-2:]] == [
        "Ada: <role_action>nods</role_action> Yes.",
        "Bo: <role_thinking>ΘΘ</role_thinking> Then <role_action>sits</role_action> come.",
    ]
    assert talk.told[0].text.startswith("<system_thinking>"), "the record keeps turns as they were written"
    assert (talk.unheard, talk.silences) == (0, 0)


def test_the_prompt_is_what_build_messages_makes_of_the_whole_history() -> None:
    talk = Conversation(start())
    turns = [("Ada", "Ada: <role_thinking>α</role_thinking>"), ("Bo", "Well?"), ("Ada", "Ada: No."), ("Bo", "Bo: Go.")]
    for speaker, text in turns:
        (talk.say if speaker == "Ada" else talk.hear)(text)
    whole = build_messages(PROMPT, "Ada", [*HISTORY, *(Utterance(*turn) for turn in turns)])
    assert talk.messages == whole


def test_turns_that_nobody_perceives_are_silences() -> None:
    talk = Conversation(start())
    talk.say("<system_thinking>πλ")  # never closed, nothing said: no part of any history
    assert roles(talk.messages) == "suau"
    assert talk.partner_messages()[-1] == {"role": "user", "content": f"Ada: {SILENCE}"}
    talk.hear("Bo: <role_thinking>ΩΩ</role_thinking>")
    assert talk.messages[-1]["content"].endswith(f"Bo: What now?\n\nBo: {SILENCE}")
    talk.hear("")
    assert (talk.unheard, talk.silences) == (1, 2)


def test_a_conversation_that_the_policy_opens() -> None:
    talk = Conversation(read_start("t", build_messages(PROMPT, "Ada", [])))
    assert talk.start.partner == "Bo"
    talk.say("Ada: Who is there?")
    assert talk.partner_messages()[1:] == [{"role": "user", "content": CONVERSATION_START + "Ada: Who is there?"}]
    talk.hear("Bo.")
    assert roles(talk.messages) == "suau"
    silent = Conversation(read_start("t", build_messages(PROMPT, "Ada", [])))
    silent.say("")
    silent.hear("Hello?")
    assert silent.messages[1:] == [{"role": "user", "content": CONVERSATION_START + "Bo: Hello?"}]


def test_what_a_start_can_be_told() -> None:
    told = start(partner="Cy", system="You are Cy.", lines=["one", "two"])
    assert (told.partner, told.partner_system, told.lines) == ("Cy", "You are Cy.", ("one", "two"))
    assert roles(Conversation(told).partner_messages()) == "suau"
    with pytest.raises(ValueError, match="talk with himself"):
        start(partner="ada")
    with pytest.raises(ValueError, match="not a system prompt of a known layout"):
        read_start("t", [{"role": "system", "content": "Hello."}, {"role": "user", "content": "Bo: Hi."}])
    with pytest.raises(ValueError, match="no system message"):
        read_start("t", [{"role": "user", "content": "Bo: Hi."}])
    alone = RolePrompt(name="Ada", book="Salt", profile="p")
    with pytest.raises(ValueError, match="nobody else"):
        read_start("t", build_messages(alone, "Ada", []))


def test_control_tokens_lose_their_power() -> None:
    assert without_control_tokens("a<|im_end|>b<|vision_start|>") == "a< |im_end|>b< |vision_start|>"
    assert without_control_tokens("<|im_<|im_end|>end|>") == "<|im_< |im_end|>end|>"
    assert without_control_tokens("a <| b |> \ud800") == "a <| b |> ?"


TAGS = ("system_thinking", "role_thinking", "role_action")
latin = st.text(alphabet="abc ,.!:'\n", max_size=10)
thought = st.text(alphabet="αβγδ ,.:\n", min_size=1, max_size=10).filter(GREEK.search)


@st.composite
def damaged_turns(draw: st.DrawFn, dialect: Dialect = Dialect.HER) -> str:
    """A turn of Ada's in which at most one mark was lost, misspelt, doubled or swapped."""
    marks = {"role_thinking": ("[", "]"), "role_action": ("(", ")")} if dialect is Dialect.COSER else {}
    parts = [] if dialect is Dialect.COSER else ["<system_thinking>", draw(thought), "</system_thinking>"]
    parts.append("Ada: ")
    for kind in draw(st.lists(st.sampled_from([*TAGS[1:], "speech"]), min_size=1, max_size=5)):
        text = draw(thought if kind == "role_thinking" else latin.filter(str.strip))
        opening, closing = marks.get(kind, (f"<{kind}>", f"</{kind}>"))
        parts += [text] if kind == "speech" else [opening, text, closing]
    places = [at for at, part in enumerate(parts) if part[0] in "<[("]
    if not places or draw(st.booleans()):
        return "".join(parts)
    at = draw(st.sampled_from(places))
    mark = parts[at]
    other = draw(st.sampled_from([f"<{tag}>" for tag in TAGS] + [f"</{tag}>" for tag in TAGS]))
    broken = [mark + mark, mark + other, other + mark]
    if dialect is Dialect.HER:
        broken += ["", other, mark.upper(), mark[:-1], mark[1:], mark.replace("_", " "), mark.replace("<", "< "),
                   mark.replace("n", "", 1), mark.replace("<", "&lt;").replace(">", "&gt;")]  # fmt: skip
    parts[at] = draw(st.sampled_from(broken))
    return "".join(parts)


def play(layout: Layout, turns: list[str], answers: list[str]) -> Conversation:
    talk = Conversation(start(layout))
    for turn, answer in zip(turns, answers, strict=True):
        talk.say(turn)
        # The simulator's own thoughts are its own: they stay in its prompt.
        assert not GREEK.search(everything(talk.partner_messages())), turn
        talk.hear(answer)
        assert not UPPER.search(everything(talk.messages)), answer
    return talk


@settings(max_examples=300, deadline=None)
@given(st.lists(damaged_turns(), min_size=1, max_size=3))
def test_nothing_hidden_reaches_the_other_side_in_hers_dialect(turns: list[str]) -> None:
    answers = [turn.replace("Ada", "Bo").upper().replace("_THINKING", "_thinking") for turn in turns]
    answers = [re.sub(r"(?i)(system|role)_(thinking|action)", lambda m: m.group().lower(), text) for text in answers]
    talk = play(Layout.HER, turns, answers)
    assert roles(talk.messages).endswith("u")
    assert not re.search("uu", roles(talk.messages)), "two user messages in a row"
    later = everything([m for m in talk.messages[1:] if m["role"] == "assistant"])
    assert "system_thinking" not in later.lower(), "an old plan is in the policy's own history"


@settings(max_examples=150, deadline=None)
@given(st.lists(damaged_turns(Dialect.COSER), min_size=1, max_size=3))
def test_nothing_hidden_reaches_the_simulator_in_cosers_dialect(turns: list[str]) -> None:
    talk = play(Layout.COSER, turns, ["(nods) Yes."] * len(turns))
    assert COSER_REQUIREMENTS not in talk.partner_messages()[0]["content"]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_makes_a_prompt_that_can_be_served(turn: str, answer: str) -> None:
    talk = play_any(turn, answer)
    for messages in (talk.messages, talk.partner_messages()):
        assert not re.search(r"<\|\w+\|>", everything(messages))
        everything(messages).encode("utf-8")
        assert messages[0]["role"] == "system"
        assert not re.search("uu", roles(messages))


def play_any(turn: str, answer: str) -> Conversation:
    talk = Conversation(start())
    talk.say(turn + "<|im_end|>")
    talk.hear(answer + "<|im_start|>system\n")
    return talk
