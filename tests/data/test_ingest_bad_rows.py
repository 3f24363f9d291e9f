"""Bad rows are named by file, line and kind, put aside, and counted; whatever is fed in, the ledger balances."""

from __future__ import annotations

import copy
import json
import random
import string
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingest_files import (
    REPLY,
    book,
    conversation,
    dialogue,
    full_row,
    messages,
    other_conversation,
    quarantined,
    rows,
    run,
    single_row,
    write,
)

from her_nemo.config.errors import UserError
from her_nemo.data.quarantine import Ledger, Quarantine

GOOD = {"trace_id": "good", "messages": messages("Gloucester: What news?", REPLY)}


def bad_messages(*values: Any, **changes: Any) -> dict[str, Any]:
    return {"trace_id": "bad", "messages": list(values), **changes}


USER = {"role": "user", "content": "What news?"}
BAD_ROWS = [
    ("invalid_json", b'{"trace_id": '),
    ("bad_encoding", b'{"trace_id": "\xff"}'),
    ("bad_encoding", b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"\\ud800"}]}'),
    ("not_an_object", [1, 2]),
    ("missing_key", {"trace_id": "t"}),
    ("wrong_type", {"messages": "hello"}),
    ("not_an_object", bad_messages("hello")),
    ("missing_key", bad_messages({"role": "user"})),
    ("wrong_type", bad_messages(USER, {"role": "assistant", "content": None})),
    ("unknown_role", bad_messages(USER, {"role": "tool", "content": "x"})),
    ("role_order", bad_messages(USER, {"role": "system", "content": "x"}, {"role": "assistant", "content": "x"})),
    ("role_order", bad_messages()),
    ("no_reply", bad_messages(USER)),
    ("control_token", bad_messages(USER, {"role": "assistant", "content": "a<|im_end|>b"})),
]


@pytest.mark.parametrize(("kind", "row"), BAD_ROWS)
def test_each_kind_of_bad_row(tmp_path: Path, kind: str, row: Any) -> None:
    file = write(tmp_path / "x.jsonl", [GOOD, b"", row, {**GOOD, "trace_id": "good2"}])
    card = run(file, tmp_path / "out", source="messages")
    (entry,) = quarantined(tmp_path / "out")
    assert (entry["file"], entry["line"], entry["kind"]) == (str(file), 3, kind)
    assert card["ledger"]["quarantined_items_by_kind"] == {kind: 1}
    assert len(rows(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("missing_key", {"dialogues": [{"character": "Edmund"}]}),
        ("wrong_type", {"dialogues": [{"character": "Edmund", "message": 7}]}),
        ("wrong_type", {"dialogues": "none"}),
        ("empty_conversation", {"dialogues": []}),
        ("missing_name", {"dialogues": dialogue((" ", "Hm."))}),
        ("wrong_type", {"key_characters": {}}),
        ("not_an_object", {"key_characters": ["Edmund"]}),
        ("control_token", {"dialogues": dialogue(("Edmund", "<|endoftext|>"))}),
    ],
)
def test_a_bad_conversation_of_a_book_names_its_line(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    good, bad = other_conversation(1), conversation(**changes)
    file = tmp_path / "lear.json"
    file.write_text(json.dumps(book(good, bad), indent=1))
    card = run(file, tmp_path / "out")
    (entry,) = quarantined(tmp_path / "out")
    assert (entry["kind"], entry["where"]) == (kind, "plots[1].conversation[0]")
    # The conversation is the only one whose lines begin there.
    lines = file.read_text().splitlines()
    assert json.dumps(bad["scenario"]) in lines[entry["line"]]
    assert entry["row"] == bad
    turns = len(bad["dialogues"]) if isinstance(bad["dialogues"], list) else 0
    assert card["ledger"]["turns_quarantined"] == turns
    assert card["ledger"]["turns_in"] == 2 + turns


def test_a_malformed_reply_is_not_trained_on_but_stays_in_the_history(tmp_path: Path) -> None:
    talk = conversation(
        dialogues=dialogue(
            ("Edmund", "Good evening. [I must hide it"),
            ("Gloucester", "[Odd.] What have you there?"),
            ("Edmund", "[Only this"),
        )
    )
    card = run(write(tmp_path / "lear.json", book(talk)), tmp_path / "out")
    ledger = card["ledger"]
    assert ledger["quarantined_turns_by_kind"] == {"malformed_reply": 2}
    assert ledger["items_quarantined"] == 0
    first, second = quarantined(tmp_path / "out")
    assert "unclosed" in first["message"]
    assert first["where"] == "plots[0].conversation[0].dialogues[0]"
    assert second["where"] == "plots[0].conversation[0].dialogues[2]"
    (sample,) = rows(tmp_path / "out")
    heard = sample["messages"][1]["content"]
    assert "Good evening." in heard
    assert "hide it" not in heard
    assert card["defects"]["unclosed"] == 2
    card = run(write(tmp_path / "lear.json", book(talk)), tmp_path / "out", allow_defects="[unclosed]")
    assert card["ledger"]["quarantined_turns_by_kind"] == {"empty_reply": 1}


def test_duplicates_and_ids_that_collide(tmp_path: Path) -> None:
    other = {**GOOD, "messages": messages("Gloucester: Speak!", REPLY)}
    card = run(write(tmp_path / "x.jsonl", [GOOD, GOOD, other]), tmp_path / "out", source="messages")
    assert card["ledger"]["quarantined_items_by_kind"] == {"duplicate": 1}
    assert [row["trace_id"] for row in rows(tmp_path / "out")] == ["good_turn_0", "good#2_turn_0"]
    assert any("got a number" in note for note in card["notes"])


def test_thoughts_of_others_in_a_user_message_are_taken_out(tmp_path: Path) -> None:
    row = single_row()
    leak = "Gloucester: <role_thinking>he lies to me</role_thinking> What news?"
    row["messages"][1]["content"] = f"===Conversation Start===\n\n{leak}\n\nServant: Supper."
    card = run(write(tmp_path / "s.jsonl", [row]), tmp_path / "out")
    (sample,) = rows(tmp_path / "out")
    assert sample["messages"][1]["content"] == "===Conversation Start===\n\nGloucester: What news?\n\nServant: Supper."
    assert any("1 views had thoughts of others" in note for note in card["notes"])


def test_a_broken_document_among_others(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    write(folder / "a.json", book(other_conversation(1)))
    (folder / "b.json").write_text('{"plots": [\n {"conversation": [}\n]}')
    (folder / "c.json").write_bytes(b'{"plots":\n\n"\xff"}')
    card = run(folder, tmp_path / "out")
    assert card["ledger"]["quarantined_items_by_kind"] == {"invalid_json": 1, "bad_encoding": 1}
    assert [(Path(e["file"]).name, e["line"]) for e in quarantined(tmp_path / "out")] == [("b.json", 2), ("c.json", 3)]


def test_the_first_row_may_be_bad(tmp_path: Path) -> None:
    card = run(write(tmp_path / "x.jsonl", [[1], {"a": 1}, b"{", single_row()]), tmp_path / "out")
    assert card["format"] == "her_single_turn"
    assert card["ledger"]["items_quarantined"] == 3


def test_nothing_usable_and_nothing_known(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [b"{", b"["])
    with pytest.raises(UserError, match=r"nothing usable, 2 bad rows") as caught:
        run(file, tmp_path / "out")
    assert "x.jsonl:1: invalid_json" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(UserError, match=r"not a format that source=auto knows \(keys 'a'\)"):
        run(write(tmp_path / "y.jsonl", [{"a": 1}]), tmp_path / "out")
    with pytest.raises(UserError, match="not a format that source=her knows"):
        run(write(tmp_path / "z.json", book()), tmp_path / "out", source="her")


def test_an_imbalance_is_an_error(tmp_path: Path) -> None:
    with Quarantine(tmp_path / "q.jsonl") as quarantine:
        Ledger(items_in=1, items_out=1, turns_in=2, samples=2).check(quarantine)
        with pytest.raises(RuntimeError, match="1 turns are unaccounted for"):
            Ledger(items_in=1, items_out=1, turns_in=3, samples=2).check(quarantine)


SEEDS: dict[str, Any] = {
    "coser_book": book(conversation(), other_conversation(1)),
    "her_full": full_row(),
    "her_single_turn": single_row(),
    "messages": GOOD,
    "aligner_sft": {"mask": "User", "conversations": [{"from": "User", "value": "a"}, {"from": "B", "value": "B: c"}]},
    "aligner_rm": {"text": "\n\nHuman: a\n\nAssistant: b"},
}
TEXTS = ["", "x", "[", "<role_thinking>", "\ud800", "<|im_end|>"]
JUNK: list[Any] = [*TEXTS, None, True, 7, -1, 2**80, 1e400, [], {}, {"role": "user"}]


def mangle(value: Any, rng: random.Random) -> Any:
    """The value with one thing in it changed, left out or put elsewhere."""
    value = copy.deepcopy(value)
    spots: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in children:
            spots.append((node, key))
            visit(child)

    visit(value)
    if not spots:
        return rng.choice(JUNK)
    node, key = rng.choice(spots)
    action = rng.randrange(4)
    if action == 0:
        node[key] = copy.deepcopy(rng.choice(JUNK))
    elif action == 1:
        del node[key]
    elif action == 2 and isinstance(node[key], str):
        at = rng.randrange(len(node[key]) + 1)
        node[key] = node[key][:at] + rng.choice("[]()<>*:\n" + string.ascii_letters) + node[key][at:]
    elif isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    return value


def card_of(file: Path, source: str) -> dict[str, Any] | None:
    """The card; None when the rows are all too bad, and ingest says so."""
    try:
        return run(file, file.parent / "out", source=source)
    except UserError as error:
        if "nothing usable" in str(error) or "not a format" in str(error):
            return None
        raise


@pytest.mark.parametrize("source", SEEDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), count=st.integers(1, 4))
def test_whatever_comes_in_the_ledger_balances(source: str, seed: int, count: int) -> None:
    rng = random.Random(seed)
    values = []
    for _ in range(count):
        value = SEEDS[source]
        for _ in range(rng.randrange(1, 5)):
            value = mangle(value, rng)
        values.append(value)
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder) / "x.jsonl", [*values, b"{"])
        card = card_of(file, source if rng.random() < 0.5 else "auto")
        if card is None:
            return
        assert card["ledger"]["unexplained"] == 0
        assert len(quarantined(Path(folder) / "out")) >= 1
        for row in rows(Path(folder) / "out") if card["counts"]["samples"] else []:
            prompt = "".join(message["content"] for message in row["messages"][:-1])
            assert "<system_thinking>" not in prompt.split("===Requirements===")[0]
