"""Passages of a book: how they are cut, found, and kept from telling what comes."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest

from her_nemo.config.errors import UserError
from her_nemo.evaluation.retrieval import TARGETS, Library, Passages, chunks


def test_bm25_by_hand() -> None:
    passages = Passages(["storm storm heath", "storm on sea", "letter of love"])
    # Lengths 3, 3, 3: the norm is 1.5. "storm" stands in two of three: ln(1 + 1.5 / 2.5).
    rarity = math.log(1 + 1.5 / 2.5)
    assert passages._score({"storm"}, 0) == pytest.approx(rarity * 2 * 2.5 / 3.5)
    assert passages._score({"storm"}, 1) == pytest.approx(rarity * 2.5 / 2.5)
    assert passages._score({"storm"}, 2) == 0.0
    assert passages.search("A storm at sea", 1) == ["storm on sea"]
    assert passages.search("love and storm, storm", 2) == ["storm storm heath", "letter of love"], (
        "in the book's order"
    )
    assert passages.search("nothing like it", 2) == ["storm storm heath", "storm on sea"]
    assert Passages([]).search("x", 3) == []


def test_chunks_cover_the_text_and_end_between_words() -> None:
    text = " ".join(f"word{number}" for number in range(600))
    found = chunks(text)
    assert all(len(part) <= 1000 for part in found)
    assert {word for part in found for word in part.split()} == set(text.split())
    for before, after in itertools.pairwise(found):
        shared = set(before.split()) & set(after.split())
        assert 100 <= len(" ".join(shared)) <= 220
    assert chunks("short") == ["short"]
    assert chunks("  ") == []
    assert [len(part) for part in chunks("x" * 2500)] == [1000, 1000, 900]


def plot(number: int) -> dict:
    return {
        "text": f"Text {number}.",
        "summary": f"Summary {number}.",
        "key_characters": [{"name": "Ann", "experience": f"Experience {number}."}],
        "conversation": [
            {
                "scenario": f"Scene {number}.",
                "dialogues": [{"character": "Ann", "message": f"[Secret.] Line {number}."}],
            }
        ],
    }


def book(directory: Path, **changed) -> Path:
    body = {
        "plots": [plot(number) for number in range(5)],
        "split_plot_index": 4,
        "character_datasets": {
            "Ann": {
                "plots": [{"i_p": 0}, {"i_p": 2}],
                "conversations": [{"i_p": 3}],
                "utterances": [{"i_p": 4}],
            }
        },
    }
    (directory / "The Tale.json").write_text(json.dumps(body | changed))
    return directory


def test_what_is_to_come_is_not_found(tmp_path) -> None:
    book(tmp_path)

    def texts(plot_number: int, held_out: bool) -> list[str]:
        memory = Library(tmp_path, "raw_text", held_out=held_out).memory("The Tale", plot_number, "Ann")
        return memory.passages["text"].texts

    assert texts(4, held_out=False) == ["Text 0.", "Text 2.", "Text 3."]
    assert texts(3, held_out=False) == ["Text 0.", "Text 2."]
    assert texts(4, held_out=True) == ["Text 0.", "Text 2.", "Text 3.", "Text 4."], (
        "upstream finds the scene itself"
    )


@pytest.mark.parametrize("target", TARGETS)
def test_every_target(tmp_path, target) -> None:
    memory = Library(book(tmp_path), target, held_out=False).memory("The Tale", 4, "Ann")
    shown = memory.recall("Summary 2 and line 2, text 2")
    assert ("Text 2." in shown) is (target == "raw_text")
    assert ("Ann: Experience 2." in shown) is target.startswith("expr")
    assert ("Ann: Line 2." in shown) is ("conv1" in target)
    assert "Secret" not in shown, "not even one's own: the conversation is as others heard it"
    many = {"expr3", "expr3_conv1", "expr10_conv1"}
    assert ("Experience 0." in shown) is (target in many)


def test_who_and_what_is_not_there(tmp_path) -> None:
    assert Library(book(tmp_path), "expr1", held_out=False).memory("The Tale", 4, "Bob") is None
    with pytest.raises(UserError, match=r"no The Sequel\.json"):
        Library(tmp_path, "expr1", held_out=False).memory("The Sequel", 4, "Ann")
    book(tmp_path, plots=[])
    with pytest.raises(UserError, match="not a book of CoSER's form"):
        Library(tmp_path, "expr1", held_out=True).memory("The Tale", 4, "Ann")


def test_the_public_books(shared_data) -> None:
    place = shared_data / "coser"
    upstream = Library(place, "conv1", held_out=True).memory("King Lear", 17, "Fool")
    ours = Library(place, "conv1", held_out=False).memory("King Lear", 17, "Fool")
    said = "Why to keep so many brains in one head"
    assert any(said in text for text in upstream.passages["conversation"].texts), "the scene to be played"
    assert not any(said in text for text in ours.passages["conversation"].texts)
    assert len(ours.passages["conversation"].texts) >= 4
