"""Every message of the public samples: exact both ways, no thought to others, no visible word lost."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from her_nemo.roleplay.dialects import Dialect, parse_message, render_message, to_her, write_message
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.names import same_name
from her_nemo.roleplay.prompt import CONVERSATION_START
from her_nemo.roleplay.turn import parse_turn, render_turn
from her_nemo.roleplay.views import VIEWS, Reader, view


def coser_messages(data: Path) -> Iterator[tuple[str, str]]:
    """(character, message) of the two books and of the test cases."""
    for file in ("king_lear.json", "othello.json"):
        for plot in json.loads((data / "coser" / file).read_text("utf-8"))["plots"]:
            for conversation in plot["conversation"]:
                yield from ((d["character"], d["message"]) for d in conversation["dialogues"])
    for case in json.loads((data / "coser/test_set_sample.json").read_text("utf-8")):
        yield from ((d["character"], d["message"]) for d in case["dialogues"])


def sharegpt_turns(data: Path) -> Iterator[str]:
    """Every `Name: message` of the ShareGPT sample."""
    for row in json.loads((data / "coser/sharegpt_sample.json").read_text("utf-8")):
        for message in row["conversations"][1:]:
            yield from filter(None, message["value"].removeprefix(CONVERSATION_START).strip().split("\n\n"))


def her_messages(data: Path) -> Iterator[tuple[str, str]]:
    """(role, content) of every chat message of the HER samples that a character says or hears."""
    for file in ("full", "sft_multi_turn", "sft_single_turn"):
        for line in (data / f"her/{file}_sample.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            for messages in row["training_samples"].values() if file == "full" else [row["messages"]]:
                yield from ((m["role"], m["content"]) for m in messages if m["role"] != "system")


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def test_coser_messages(shared_data: Path) -> None:
    count: Counter[str] = Counter()
    for character, message in coser_messages(shared_data):
        turn = parse_message(message, Dialect.COSER)
        assert turn.well_formed, (message, turn.findings)
        assert render_message(turn, Dialect.COSER) == message
        her = to_her(message, Dialect.COSER, character)
        back = parse_turn(her, expect_plan=False, expect_name=character)
        assert back.well_formed
        assert render_turn(back) == her
        # and out again: the message is what it was, with the name before it
        assert write_message(back, Dialect.COSER) == f"{character}: {message}".strip()
        visible = words(re.sub(r"\[.*?\]", " ", f"{character}: {message}"))
        for reader in (Reader.OTHER_CHARACTER, Reader.USER, Reader.JUDGE_COSER):
            assert words(re.sub(r"</?role_action>", " ", view(back, reader))) == visible
        assert words(view(back, Reader.JUDGE_COSER_HER)) == words(f"{character}: {message}")
        count.update(segment.kind for segment in turn.segments if not segment.blank)
    assert count == {Kind.ROLE_THINKING: 304, Kind.ROLE_ACTION: 109, Kind.SPEECH: 360}


def test_sharegpt_turns(shared_data: Path) -> None:
    turns = [parse_message(text, Dialect.COSER) for text in sharegpt_turns(shared_data)]
    assert len(turns) == 410
    for turn in turns:
        assert turn.name is not None, turn.text
        assert {defect.value for defect in turn.defects} <= {"empty_reply"}, (turn.text, turn.findings)
        assert render_message(turn, Dialect.COSER) == turn.text
        assert words(view(turn, Reader.JUDGE_COSER)) == words(re.sub(r"\[.*?\]", " ", turn.text))


def test_her_messages(shared_data: Path) -> None:
    count: Counter[str] = Counter()
    for role, content in her_messages(shared_data):
        count[role] += 1
        texts = [content] if role == "assistant" else content.removeprefix(CONVERSATION_START).split("\n\n")
        for text in filter(None, texts):
            turn = parse_turn(text, expect_plan=text.startswith("<system_thinking>"))
            assert turn.well_formed, (text, turn.findings)
            assert render_turn(turn) == text
            for reader, table in VIEWS.items():
                hidden = [s.text for s in turn.segments if not table.sees(s.kind)]
                heard = [s.text for s in turn.segments if table.sees(s.kind)]
                assert all(thought not in view(turn, reader) for thought in hidden)
                assert all(part.strip() in view(turn, reader) for part in heard)
    assert set(count) == {"user", "assistant"}


@pytest.mark.parametrize("field", ["standard_format", "enhanced_standard_format", "message"])
def test_her_dialogues(shared_data: Path, field: str) -> None:
    """The three forms in which HER's full schema keeps a message say the same."""
    dialect = Dialect.COSER if field == "message" else Dialect.HER
    for line in (shared_data / "her/full_sample.jsonl").read_text("utf-8").splitlines():
        for conversation in json.loads(line)["conversation"]:
            for dialogue in conversation["dialogues"]:
                name = dialogue["character"]
                her = to_her(dialogue[field], dialect, name)
                assert her.split() == f"{name}: {dialogue['standard_format']}".split()


def test_roleplay_bench(shared_data: Path) -> None:
    for line in (shared_data / "roleplay_bench/seeds_sample.jsonl").read_text("utf-8").splitlines():
        seed = json.loads(line)
        for text in (seed["ai_prologue"], seed["initial_user_input"]):
            turn = parse_message(text, Dialect.STARRED)
            assert turn.well_formed
            assert render_message(turn, Dialect.STARRED) == text
            actions = [s.text for s in turn.segments if s.kind is Kind.ROLE_ACTION]
            assert actions == re.findall(r"\*([^*]+)\*", text)


def test_names_of_the_samples_are_told_apart(shared_data: Path) -> None:
    names = {name for name, _ in coser_messages(shared_data)}
    assert len(names) > 10
    assert not [(a, b) for a in names for b in names if a != b and same_name(a, b)]
