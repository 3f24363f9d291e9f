"""Rows to train on: what is in them, that every reader takes them, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from her_nemo.chat.exports import RowFiles, pair_row, sample_rows
from her_nemo.chat.scenes import load_scenes
from her_nemo.chat.session import ChatSession
from her_nemo.config.data import IngestConfig
from her_nemo.config.errors import UserError
from her_nemo.data.ingest import ingest
from her_nemo.data.records import read_parquet
from her_nemo.data.sources import read_rows

GOOD = (
    "<system_thinking>Kit Holt should evade.</system_thinking>Kit Holt: <role_thinking>I hide the mask."
    "</role_thinking> <role_action>nods</role_action> Listen, the drum is mine."
)
OTHER = GOOD.replace("mine", "gone")
LATER = GOOD.partition("</system_thinking>")[2]


@pytest.fixture
def played(session: ChatSession) -> ChatSession:
    """Two turns of the lead, one of them by a person, and an alternative of the first."""
    session.add("Kit Holt", GOOD)
    session.add_alternative(1, OTHER, choose=False)
    session.say("Pia Penn", "<role_thinking>He lies.</role_thinking> Truly?")
    session.say("Kit Holt", "*shrugs* Ask again.")
    return session


def test_samples_are_the_turns_of_the_lead_as_he_came_to_them(played: ChatSession) -> None:
    rows, left_out = sample_rows(played)
    assert left_out == []
    assert [row["trace_id"] for row in rows] == [f"chat_mini-chat-000000_s1_Kit Holt_turn_{n}" for n in (0, 1)]
    assert [row["written_by"] for row in rows] == ["model", "person"]
    assert [row["has_plan"] for row in rows] == [True, False]
    assert [row["history_turns"] for row in rows] == [0, 1]
    assert rows[0]["messages"][-1] == {"role": "assistant", "content": GOOD}
    assert [message["content"] for message in rows[1]["messages"][1:]] == [
        "===Conversation Start===\n\nPia Penn: Tell me about the drum.",
        LATER,
        "Pia Penn: Truly?",
        "Kit Holt: <role_action>shrugs</role_action> Ask again.",
    ]


def test_the_sft_stage_and_ingest_read_the_samples(played: ChatSession, tmp_path: Path) -> None:
    files = RowFiles(tmp_path / "chat")
    assert files.write_samples(played) == (2, [])
    rows, report = read_rows(files.samples, "sft")
    assert (len(rows), report.total) == (2, 0)
    card = ingest(IngestConfig(name="x", path=str(files.samples), out=str(tmp_path / "data")))
    assert card["format"] == "her_single_turn"
    assert card["ledger"]["turns_quarantined"] == card["ledger"]["unexplained"] == 0
    back = list(read_parquet(tmp_path / "data" / "samples.parquet"))
    assert [row["messages"] for row in back] == [row["messages"] for row in rows]
    for key in ("trace_id", "original_trace_id", "turn_index", "character", "book", "conversation_id", "has_plan"):
        assert [row[key] for row in back] == [row[key] for row in rows], key


def test_samples_of_a_coser_scene_come_back_from_ingest(shared_data: Path, tmp_path: Path) -> None:
    scenes, _ = load_scenes([str(shared_data / "coser" / "king_lear.json")], 2)
    files = RowFiles(tmp_path / "chat")
    for number, scene in enumerate(scenes):
        session = ChatSession.begin(scene, scene.parts[0].name, f"s{number}")
        for line in ("One.", "Two."):
            session.say(session.others[0], line)
            session.add(session.lead, f"<system_thinking>p</system_thinking>{session.lead}: {line}")
        assert files.write_samples(session) == (2, [])
    card = ingest(IngestConfig(name="x", path=str(files.samples), out=str(tmp_path / "data")))
    back = list(read_parquet(tmp_path / "data" / "samples.parquet"))
    assert [row["messages"] for row in back] == [row["messages"] for row in read_rows(files.samples, "sft")[0]]
    assert card["ledger"]["unexplained"] == 0
    assert {row["book"] for row in back} == {"King Lear"}


def test_a_reply_that_must_not_be_trained_on_is_left_out_with_its_reason(session: ChatSession, tmp_path: Path) -> None:
    files = RowFiles(tmp_path)
    session.add("Kit Holt", "Kit Holt: <role_thinking>open")
    with pytest.raises(UserError, match="turn 2: malformed: empty_reply, unclosed"):
        files.write_samples(session)
    assert not files.samples.exists()
    session.edit(1, GOOD)
    session.say("Pia Penn", "So?")
    session.add("Kit Holt", "Kit Holt: I will tell you ab", finished=False)
    session.say("Pia Penn", "So?")
    session.add("Kit Holt", "Pia Penn: I am somebody else.")
    count, left_out = files.write_samples(session)
    assert count == 1
    assert [item.turn for item in left_out] == [3, 5]
    assert [item.reason for item in left_out] == ["cut off before its end", "malformed: wrong_name"]
    assert read_rows(files.samples, "sft")[0][0]["written_by"] == "edit"


def test_a_conversation_exported_again_replaces_itself_and_nothing_else(played: ChatSession, tmp_path: Path) -> None:
    files = RowFiles(tmp_path)
    files.write_samples(played)
    other = ChatSession.begin(played.scene, "Kit Holt", "s2")
    other.add("Kit Holt", OTHER)
    files.write_samples(other)
    played.rewind(2)
    played.edit(1, OTHER.replace("gone", "sold"))
    files.write_samples(played)
    rows, _ = read_rows(files.samples, "sft")
    assert [(row["conversation_id"][-2:], row["messages"][-1]["content"]) for row in rows] == [
        ("s2", OTHER),
        ("s1", OTHER.replace("gone", "sold")),
    ]


def test_a_pair_is_what_the_reward_stage_reads(played: ChatSession, tmp_path: Path) -> None:
    files = RowFiles(tmp_path)
    assert files.write_pair(pair_row(played, 1, 1, 0)) == 1
    rows, report = read_rows(files.pairs, "pairs")
    assert report.total == 0
    assert (rows[0]["chosen"], rows[0]["rejected"]) == (OTHER, GOOD)
    assert rows[0]["messages"] == played.prompt_for("Kit Holt", 1)
    assert (rows[0]["chosen_by"], rows[0]["rejected_by"]) == ("model", "model")
    assert files.write_pair(pair_row(played, 1, 0, 1)) == 1  # judged again, the other way: the last word counts
    assert read_rows(files.pairs, "pairs")[0][0]["chosen"] == GOOD
    played.edit(1, GOOD.replace("mine", "hers"))
    assert files.write_pair(pair_row(played, 1, 2, 0)) == 2
    assert read_rows(files.pairs, "pairs")[0][1]["chosen_by"] == "edit"


def test_pairs_that_cannot_be(played: ChatSession) -> None:
    played.add_alternative(1, "Kit Holt: I w", finished=False, choose=False)
    played.add("Kit Holt", GOOD)  # he spoke last himself
    played.add_alternative(4, OTHER)
    for arguments, said in (
        ((2, 0, 1), "Pia Penn's"),
        ((1, 0, 9), "3 texts"),
        ((1, 0, 0), "the same"),
        ((1, 0, 2), "cut off"),
        ((4, 0, 1), "spoke last"),
    ):
        with pytest.raises(UserError, match=said):
            pair_row(played, *arguments)


def test_a_file_that_holds_something_else_is_not_written_over(played: ChatSession, tmp_path: Path) -> None:
    files = RowFiles(tmp_path)
    files.samples.write_text('{"a": 1}\nnot JSON\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"samples\.jsonl:2: not JSON"):
        files.write_samples(played)
    assert files.samples.read_text(encoding="utf-8") == '{"a": 1}\nnot JSON\n'
    files.samples.write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    files.write_samples(played)
    assert len(files.samples.read_text(encoding="utf-8").strip().split("\n")) == 3
    with pytest.raises(UserError, match="cannot write"):
        RowFiles(files.samples).write_samples(played)


def test_a_chat_in_a_scene_of_the_test_set_is_found_by_ingest(shared_data: Path, tmp_path: Path) -> None:
    test_set = str(shared_data / "coser" / "test_set_sample.json")
    held_out, _ = load_scenes([test_set], 1)
    free, _ = load_scenes([str(shared_data / "coser" / "othello.json")], 1)
    files = RowFiles(tmp_path / "chat")
    for scene in (*held_out, *free):
        session = ChatSession.begin(scene, scene.parts[1].name, "s1", turns=4)
        session.add(session.lead, f"{session.lead}: Enough.")
        files.write_samples(session)
    ingest(IngestConfig(name="x", path=str(files.samples), out=str(tmp_path / "data"), test_set=test_set))
    split = {row["book"]: row["split"] for row in read_parquet(tmp_path / "data" / "samples.parquet")}
    assert split.pop(held_out[0].book) == "test"
    assert len(split) == 1
    assert "test" not in split.values()

