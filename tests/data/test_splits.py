"""No conversation serves two purposes, whatever its names look like, and the test set stays out of training."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_files import book, conversation, full_row, other_conversation, rows, run, single_row, write

from her_nemo.config.sections import Shares
from her_nemo.data.records import read_conversations
from her_nemo.data.splits import Identity, Purpose, assign, overlaps, passages_of
from her_nemo.roleplay.dialects import Dialect

SHARES = Shares().model_dump()
SPELLINGS = ("Bram\u2019s Tale", "Bram's Tale", "BRAM'S  TALE", " bram\u2018s tale ", "Bram\u02bcs\u00a0Tale")


def identity(key: str, *passages: int, book: str = "", held_out: bool = False) -> Identity:
    return Identity(key, book, frozenset(passages), held_out)


def test_the_default_shares_are_her_s_and_come_out() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)
    purposes = assign([identity(f"k{n}") for n in range(20_000)], SHARES, seed=0)
    for purpose, share in SHARES.items():
        seen = sum(value == purpose for value in purposes.values()) / 20_000
        # Four standard errors of a binomial share.
        assert abs(seen - share) <= 4 * (share * (1 - share) / 20_000) ** 0.5, purpose


def test_more_data_moves_nobody_and_the_seed_does() -> None:
    few, many = ([identity(f"k{n}") for n in range(count)] for count in (100, 1000))
    one, two = assign(few, SHARES, seed=0), assign(many, SHARES, seed=0)
    assert all(two[key] == purpose for key, purpose in one.items())
    assert assign(list(reversed(many)), SHARES, seed=0) == two
    assert assign(many, SHARES, seed=1) != two


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.sets(st.integers(0, 40), max_size=4), st.booleans()), min_size=1, max_size=60
    ),
    st.lists(st.sets(st.integers(0, 40), min_size=1, max_size=3), max_size=3),
    st.integers(0, 5),
)
def test_no_overlap_whatever_is_shared(
    given_: list[tuple[int, set[int], bool]], test: list[set[int]], seed: int
) -> None:
    everyone = [identity(f"k{key}", *passages, held_out=held) for key, passages, held in given_]
    tests = [identity(f"test {n}", *passages) for n, passages in enumerate(test)]
    purposes = assign(everyone, SHARES, seed, test=tests)
    assert set(purposes) == {one.key for one in everyone}
    assert overlaps(everyone, purposes) == []
    for one in everyone:
        if one.held_out or any(one.passages & other.passages for other in tests):
            assert purposes[one.key] == Purpose.TEST


def test_overlaps_are_found() -> None:
    everyone = [identity("a", 1), identity("b", 1), identity("c", 2)]
    assert overlaps(everyone, {"a": "test", "b": "rm_rl", "c": "test"}) == [("a", "b")]


def test_whole_books() -> None:
    everyone = [identity(f"{spelling}{n}", book=spelling) for n, spelling in enumerate(SPELLINGS)]
    everyone += [identity(f"o{n}", book="Other") for n in range(5)]
    purposes = assign(everyone, SHARES, seed=3, unit="book")
    assert len({purposes[one.key] for one in everyone[:5]}) == 1
    assert len({purposes[one.key] for one in everyone[5:]}) == 1


def test_a_passage_is_the_same_in_every_dialect() -> None:
    said = "(bows low) \u2018Nothing, my lord, that you would care to read.\u2019"
    her = "<role_action>bows low</role_action> 'Nothing, my lord, that you would care to read.'"
    heard = f"===Conversation Start===\n\nEdmund: {her}\n\nGloucester: Hm."
    assert passages_of([said], Dialect.COSER) == passages_of([her], Dialect.HER) == passages_of([heard], Dialect.HER)
    thinking = "[a thought that is long enough to be told apart from any other] Nothing."
    assert passages_of([thinking], Dialect.COSER) == frozenset(), "thoughts differ between views and do not count"


def test_a_test_set_leaves_training_under_any_spelling(tmp_path: Path) -> None:
    talks = [other_conversation(n) for n in range(40)]
    case = {
        **talks[7], "book": SPELLINGS[2], "i_p": 7, "i_c": 0, "plot": {"summary": "s"}, "character_profiles": {},
    }  # fmt: skip
    # Another conversation of the test set: other names and numbers, but the same words in other quotes.
    words = [{**d, "message": d["message"].replace("'", "\u2019").upper()} for d in talks[9]["dialogues"]]
    copied = {**case, "book": "Unknown", "i_p": 99, "dialogues": words}
    test_set = write(tmp_path / "test_set.json", [case, copied])
    file = write(tmp_path / "x.json", book(*talks, book=SPELLINGS[0]))
    run(file, tmp_path / "without")
    run(file, tmp_path / "with", test_set=str(test_set))
    before = {talk.plot_index: talk.split for talk in read_conversations(tmp_path / "without")}
    after = {talk.plot_index: talk.split for talk in read_conversations(tmp_path / "with")}
    assert "test" not in before.values()
    assert {plot for plot, split in after.items() if split == "test"} == {7, 9}
    assert all(after[plot] == before[plot] for plot in after if plot not in (7, 9))
    assert {row["split"] for row in rows(tmp_path / "with", "splits/test")} == {"test"}


def test_no_conversation_in_two_files_of_a_result(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "lear.json", book(*[other_conversation(n) for n in range(50)], conversation())),
        write(tmp_path / "full.jsonl", [full_row(n) for n in range(100, 120)]),
        write(tmp_path / "single.jsonl", [single_row(0), single_row(1)]),
    ]
    run(files, tmp_path / "out")
    owner: dict[str, str] = {}
    for purpose in Purpose:
        file = tmp_path / "out" / "splits" / f"{purpose}.parquet"
        for row in rows(tmp_path / "out", f"splits/{purpose}") if file.exists() else []:
            assert owner.setdefault(row["conversation_id"], purpose) == purpose
            assert owner.setdefault(row["original_trace_id"], purpose) == purpose
    assert len({*owner.values()}) >= 4
