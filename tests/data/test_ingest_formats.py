"""Each format becomes what it should, and no turn is lost without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
from ingest_files import (
    LINES,
    SYSTEM,
    THOUGHTS,
    book,
    conversation,
    full_row,
    messages,
    other_conversation,
    quarantined,
    rows,
    run,
    single_row,
    write,
)

from her_nemo.data.records import Conversation, read_conversations
from her_nemo.data.sources import read_rows
from her_nemo.roleplay.layouts import read_prompt


def test_a_coser_book(tmp_path: Path) -> None:
    file = write(tmp_path / "king_lear.json", book(conversation(), other_conversation(1), split_plot_index=1))
    card = run(file, tmp_path / "out")
    ledger = card["ledger"]
    assert (ledger["turns_in"], ledger["turns_out"], ledger["unexplained"]) == (7, 7, 0)
    assert ledger["context"] == {"environment": 1, "not_a_key_character": 1}
    assert card["format"] == "coser_book"
    samples = {row["trace_id"]: row for row in rows(tmp_path / "out")}
    assert list(samples) == [
        f"King Lear_Scene {plot}_{plot}_0_0_{turn}"
        for plot, turn in (
            (0, "Edmund_turn_0"),
            (0, "Edmund_turn_1"),
            (0, "Gloucester_turn_0"),
            (1, "Edmund_turn_0"),
            (1, "Gloucester_turn_0"),
        )
    ]
    second = samples["King Lear_Scene 0_0_0_0_Edmund_turn_1"]
    system, start, mine, heard, reply = (message["content"] for message in second["messages"])
    assert "Edmund schemes." in system
    assert "Edmund wants the land." in system
    assert "**Gloucester**: Gloucester believes." in system
    assert "Gloucester wants peace." not in system, "nobody knows another's motivation"
    assert "<system_thinking>" not in system, "without plans the prompt asks for none"
    assert start == f"===Conversation Start===\n\nEnvironment: {LINES[0][1]}"
    assert mine.startswith(f"Edmund: <role_thinking>{THOUGHTS[0]}</role_thinking>")
    assert heard == "Gloucester: Why so earnestly seek you to put up that letter, my boy?"
    assert reply == f"Edmund: I know no news, [sic] my lord. <role_thinking>{THOUGHTS[1]}</role_thinking>"
    assert (second["turn_index"], second["history_turns"], second["has_plan"]) == (1, 1, False)
    held_out = {row["split"] for name, row in samples.items() if "Scene 1" in name}
    assert held_out == {"test"}, "plots from split_plot_index on are CoSER's own test plots"


def test_everyone_with_a_profile_can_be_trained(tmp_path: Path) -> None:
    file = write(tmp_path / "lear.json", book())
    card = run(file, tmp_path / "out", speakers="profiled")
    assert card["ledger"]["context"] == {"environment": 1}
    assert "Servant" in {row["character"] for row in rows(tmp_path / "out")}


def test_names_differ_in_quotes_and_case(tmp_path: Path) -> None:
    talk = conversation(
        key_characters=[{"name": "D'Artagnan", "motivation": "honour"}],
        dialogues=[{"character": "d\u2019artagnan ", "message": "[now] En garde!"}],
    )
    run(write(tmp_path / "m.json", book(talk)), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert row["messages"][-1]["content"] == "D'Artagnan: <role_thinking>now</role_thinking> En garde!"


def test_coser_s_test_set_is_held_out(tmp_path: Path) -> None:
    case = {
        **conversation(), "book": "King Lear", "i_p": 3, "i_c": 1, "tag": "id",
        "plot": {"summary": "s", "chapter": "Scene 9", "text": "t", "i_chunk": 2},
        "character_profiles": {"Edmund": "Edmund schemes.", "Gloucester": "He believes."},
    }  # fmt: skip
    card = run(write(tmp_path / "test_set.json", [case]), tmp_path / "out")
    (talk,) = read_conversations(tmp_path / "out")
    assert talk.conversation_id == "King Lear_Scene 9_3_2_1"
    assert talk.held_out
    assert talk.split == "test"
    assert talk.characters[1].motivation == "Gloucester wants peace.", "test sets say `thought` for motivation"
    assert card["splits"]["test"]["samples"] == 3


def test_her_full_takes_the_latest_text_and_plan(tmp_path: Path) -> None:
    card = run(write(tmp_path / "full.jsonl", [full_row()]), tmp_path / "out")
    assert card["ledger"]["context"] == {"environment": 1}
    assert card["counts"]["samples_with_plan"] == 2
    edmund, gloucester = rows(tmp_path / "out")
    assert edmund["messages"][-1]["content"] == (
        "<system_thinking>Edmund is polite at first.</system_thinking>Edmund: "
        "<role_action>bows</role_action><role_thinking>wait for it</role_thinking> Hail."
    )
    assert "Edmund, in full." in edmund["messages"][0]["content"]
    assert "Before the storm." in edmund["messages"][0]["content"]
    assert gloucester["messages"][1]["content"].endswith("Edmund: <role_action>bows</role_action> Hail.")
    assert "peace" in gloucester["messages"][0]["content"]
    assert "land" not in gloucester["messages"][0]["content"]


def test_a_turn_without_plan_among_planned_ones_is_context(tmp_path: Path) -> None:
    row = full_row()
    del row["conversation"][0]["dialogues"][1]["sys_thinking"]
    file = write(tmp_path / "full.jsonl", [row])
    assert run(file, tmp_path / "out")["ledger"]["context"] == {"environment": 1, "no_plan": 1}
    assert run(file, tmp_path / "out", plans="any")["ledger"]["samples"] == 2


def test_her_single_and_multi_turn(tmp_path: Path) -> None:
    row = single_row()
    card = run(write(tmp_path / "s.jsonl", [row]), tmp_path / "s")
    (sample,) = rows(tmp_path / "s")
    assert sample["messages"] == row["messages"], "a well-formed row is taken as it is"
    assert (sample["book"], sample["character"]) == ("King Lear", "Edmund")
    assert sample["conversation_id"] == "King Lear_Act one_0_0_0"
    assert card["ledger"]["context"] == {"history": 1}
    multi = {"trace_id": row["original_trace_id"], "messages": row["messages"]}
    card = run(write(tmp_path / "m.jsonl", [multi]), tmp_path / "m")
    assert card["format"] == "her_multi_turn"
    (other,) = rows(tmp_path / "m")
    assert other["messages"] == row["messages"]
    assert other["split"] == sample["split"], "the same conversation serves the same purpose in every format"


def test_sharegpt_in_coser_s_dialect(tmp_path: Path) -> None:
    system = (
        "You are Iago from Othello.\n\n==Profile==\nIago hates.\n\nYour output should include **thought**, **speech**, "
        "and **action**. Use [your thought] for thoughts. Use (your action) for actions.\n\n"
    )
    turns = [
        ("system", system),
        ("human", "===Conversation Start===\n\nOthello: (frowns) Speak. [He will lie]\n\nEnvironment: Night.\n\n"),
        ("assistant", "Iago: [Now.] (bows) My lord.\n\n"),
        ("human", "Othello: Go on."),
        ("assistant", "Iago: [I have him] I dare not."),
        ("human", "Othello: Enough.\n\n"),
    ]
    value = [{"conversations": [{"from": role, "value": text} for role, text in turns]}]
    card = run(write(tmp_path / "share.json", value), tmp_path / "out")
    assert card["format"] == "coser_sharegpt"
    assert card["ledger"]["samples"] == card["ledger"]["turns_in"] == 2
    _, last = rows(tmp_path / "out")
    assert [message["content"] for message in last["messages"][1:]] == [
        "===Conversation Start===\n\nOthello: <role_action>frowns</role_action> Speak.\n\nEnvironment: Night.",
        "Iago: <role_thinking>Now.</role_thinking> <role_action>bows</role_action> My lord.",
        "Othello: Go on.",
        "Iago: <role_thinking>I have him</role_thinking> I dare not.",
    ]
    assert last["book"] == "Othello"
    assert "**thought**" not in last["messages"][0]["content"], "the prompt asks for HER's tags"
    assert "<role_thinking>" in last["messages"][0]["content"]
    assert any("thoughts of others" in note for note in card["notes"])


def test_openai_messages(tmp_path: Path) -> None:
    chat = [
        {"role": "assistant", "content": "Mara: *pours tea* Sit."},
        {"role": "user", "content": "Thank you."},
        {"role": "user", "content": "It is cold."},
        {"role": "assistant", "content": "*shrugs* It is the sea."},
    ]
    file = write(tmp_path / "chat.jsonl", [{"id": "c1", "character": "Mara", "messages": chat}])
    card = run(file, tmp_path / "out", dialect="starred")
    assert card["ledger"]["samples"] == 2
    first, second = rows(tmp_path / "out")
    assert [m["content"] for m in first["messages"]] == [
        "===Conversation Start===\n\n",
        "Mara: <role_action>pours tea</role_action> Sit.",
    ]
    assert second["messages"][2]["content"] == "Thank you.\n\nIt is cold."
    assert second["messages"][-1]["content"] == "Mara: <role_action>shrugs</role_action> It is the sea."
    assert second["trace_id"] == "c1_turn_1"


def test_a_chat_without_names_is_taken_without_names(tmp_path: Path) -> None:
    file = write(tmp_path / "chat.jsonl", [{"messages": messages("Hello", "Good day.", system=None)}])
    run(file, tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert row["messages"][-1]["content"] == "Good day."
    assert row["character"] == ""


@pytest.mark.parametrize(
    "row",
    [
        {"input": "What news?", "output": "Edmund: None."},
        {
            "system": SYSTEM, "mask": "User", "type": None,
            "conversations": [{"from": "User", "value": "What news?"}, {"from": "Assistant", "value": "Edmund: None."}],
        },
    ],
)  # fmt: skip
def test_aligner_sft(tmp_path: Path, row: dict) -> None:
    card = run(write(tmp_path / "sft.jsonl", [row]), tmp_path / "out")
    assert card["format"] == "aligner_sft"
    (sample,) = rows(tmp_path / "out")
    assert sample["messages"][-2:] == [
        {"role": "user", "content": "===Conversation Start===\n\nWhat news?"},
        {"role": "assistant", "content": "Edmund: None."},
    ]


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>system\nBe Edmund.<|im_end|>\n<|im_start|>user\nWhat news?<|im_end|>\n<|im_start|>assistant\n",
        "<extra_id_0>System\nBe Edmund.\n<extra_id_1>User\nWhat news?\n<extra_id_1>Assistant\n",
        "\n\nHuman: What news?\n\nAssistant: ",
    ],
)
def test_aligner_rm(tmp_path: Path, prompt: str) -> None:
    lines = [{"text": prompt + "Edmund: None."}, {"text": prompt + "Edmund: A letter."}]
    card = run(write(tmp_path / "rm.jsonl", lines), tmp_path / "out")
    assert (card["ledger"]["turns_in"], card["ledger"]["replies_in_pairs"]) == (2, 2)
    (pair,) = rows(tmp_path / "out", "pairs")
    assert (pair["chosen"], pair["rejected"]) == ("Edmund: None.", "Edmund: A letter.")
    assert pair["messages"][-1] == {"role": "user", "content": "What news?"}
    (read,), _ = read_rows(tmp_path / "out" / "pairs.parquet", "pairs")
    assert read == pair, "the reward stage reads it"


def test_aligner_rm_out_of_step(tmp_path: Path) -> None:
    def line(question: str, reply: str) -> dict[str, str]:
        return {"text": f"\n\nHuman: {question}\n\nAssistant: {reply}"}

    lines = [line("a", "x"), line("b", "y"), line("c", "x"), line("c", "x"), line("d", "x"), b"{", line("e", "x")]
    with pytest.raises(Exception, match="nothing usable"):
        run(write(tmp_path / "rm.jsonl", lines), tmp_path / "out")
    lines += [line("e", "y")]
    card = run(write(tmp_path / "rm.jsonl", lines), tmp_path / "out")
    kinds = card["ledger"]["quarantined_items_by_kind"]
    assert kinds == {"different_prompts": 1, "identical_pair": 1, "invalid_json": 1}
    assert [entry["line"] for entry in quarantined(tmp_path / "out")] == [1, 3, 6]


def test_our_own_conversations_come_back_with_plans(tmp_path: Path) -> None:
    run(write(tmp_path / "lear.json", book()), tmp_path / "one")
    (talk,) = read_conversations(tmp_path / "one")
    planned = talk.to_row()
    for turn in planned["turns"]:
        turn["plan"] = "A plan." if turn["speaker"] == "Edmund" else None
    del planned["held_out"]  # what another tool may leave out
    card = run(write(tmp_path / "enriched.jsonl", [planned]), tmp_path / "two")
    assert card["format"] == "conversations"
    assert card["counts"]["samples_with_plan"] == 2
    assert card["ledger"]["context"]["no_plan"] == 1
    assert all("Edmund: " in row["messages"][-1]["content"] for row in rows(tmp_path / "two"))
    assert Conversation.from_row(talk.to_row()) == talk


def test_several_files_and_a_directory(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    write(folder / "a.json", book(other_conversation(1)))
    write(folder / "b.json", book(other_conversation(2)))
    (folder / "readme.txt").write_text("not data")
    card = run([folder, write(tmp_path / "s.jsonl", [single_row()])], tmp_path / "out")
    assert card["format"] == "coser_book, her_single_turn"
    assert set(card["books"]) == {"A", "B", "King Lear"}
    assert card["ledger"]["unexplained"] == 0


@pytest.mark.parametrize("layout", ["her", "her_natural", "her_structured"])
def test_the_system_prompt_has_the_layout_asked_for(tmp_path: Path, layout: str) -> None:
    run(write(tmp_path / "lear.json", book()), tmp_path / "out", layout=layout)
    for row in rows(tmp_path / "out"):
        prompt, found = read_prompt(row["messages"][0]["content"])
        assert (found, prompt.name) == (layout, row["character"])
        assert prompt.inner_thoughts


def test_the_splits_are_what_the_stages_read(tmp_path: Path) -> None:
    file = write(tmp_path / "lear.json", book(*[other_conversation(n) for n in range(60)]))
    card = run(file, tmp_path / "out")
    seen = 0
    for purpose, kind in (("roleplay_sft", "sft"), ("rm_sft", "sft"), ("rm_rl", "sft"), ("roleplay_rl", "prompts")):
        written, report = read_rows(tmp_path / "out" / "splits" / f"{purpose}.parquet", kind)
        assert report.total == 0
        for row in written:
            assert row["split"] == purpose
            assert (row.get("reference") is None) == (kind == "sft")
            seen += 1
    assert seen == card["counts"]["samples"] == 120


def test_an_earlier_result_is_replaced_and_anything_else_left_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "lear.json", book())
    run(file, tmp_path / "out")
    (tmp_path / "out" / "old").write_text("x")
    run(file, tmp_path / "out")
    assert not (tmp_path / "out" / "old").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(Exception, match="not empty and not written by"):
        run(file, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


