"""Pairs as a judge's prompts: both orders, balance worked out by hand, labels refused where they are wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from her_nemo.config.errors import UserError
from her_nemo.data.judge_rows import (
    JudgedPair,
    balance_report,
    balanced,
    first_order,
    prompt_rows,
    read_labels,
    read_pair,
)
from her_nemo.roleplay.judging import judge_messages
from her_nemo.roleplay.verdict import Winner

ACT = "<role_action>nods</role_action>"
PAIR_ROW = {
    "trace_id": "p",
    "messages": [{"role": "system", "content": "You are Ada."}, {"role": "user", "content": "Bram: Well?"}],
    "chosen": f"<system_thinking>A plan.</system_thinking>Ada: {ACT} No, never.",
    "rejected": "<system_thinking>Another plan.</system_thinking>Ada: No.",
}


def pair(name: str, better: str, worse: str) -> JudgedPair:
    return JudgedPair(name, "context", better, worse)


def test_a_pair_stands_in_both_orders_without_its_plans() -> None:
    first, second = prompt_rows(read_pair(PAIR_ROW))
    shown = (f"Ada: {ACT} No, never.", "Ada: No.")
    assert first == {
        "trace_id": "p/cand_1",
        "messages": judge_messages("You are Ada.\n\nBram: Well?", *shown),
        "better": "cand_1",
        "pair": "p",
        # Words of tags count on both sides alike: Ada role_action nods role_action No never, and Ada No.
        "words": [6, 2],
    }
    assert second["messages"] == judge_messages("You are Ada.\n\nBram: Well?", *reversed(shown))
    assert (second["trace_id"], second["better"], second["words"]) == ("p/cand_2", "cand_2", [2, 6])
    assert "plan" not in json.dumps([row["messages"][1] for row in (first, second)])


def test_replies_that_differ_in_their_plans_alone_are_alike() -> None:
    row = PAIR_ROW | {"rejected": PAIR_ROW["chosen"].replace("A plan", "I plan")}
    assert not read_pair(row).distinct
    assert read_pair(PAIR_ROW).distinct


def test_balance_keeps_opposite_pairs_in_equal_number() -> None:
    longer = [pair(f"longer-{i}", "Ada: one two three", "Ada: one") for i in range(5)]
    shorter = [pair(f"shorter-{i}", "Ada: one", "Ada: one two three") for i in range(2)]
    tagged = [pair("tagged", f"Ada: {ACT} one two", "Ada: one")]  # longer with more tags: no opposite
    even = [pair(f"even-{i}", "Ada: one", "Ada: two") for i in range(3)]
    kept = balanced([*longer, *shorter, *tagged, *even])
    assert Counter(one.pair_id.split("-")[0] for one in kept) == {"longer": 2, "shorter": 2, "even": 3}
    assert [one.pair_id for one in kept] == sorted(
        (one.pair_id for one in kept), key=[p.pair_id for p in [*longer, *shorter, *even]].index
    )
    rows = [row for one in kept for row in prompt_rows(one)]
    assert balance_report(kept, rows) == {
        "order": {"cand_1": 7, "cand_2": 7},
        "length": {"more": 2, "same": 3, "less": 2},
        "tags": {"more": 0, "same": 7, "less": 0},
    }
    opposed = [*tagged, pair("other", "Ada: one", f"Ada: {ACT} one two")]
    assert balanced(opposed) == opposed


def test_the_order_asked_first_is_drawn_by_name() -> None:
    found = Counter(first_order(pair(f"p{i}", "a", "b")) for i in range(1000))
    assert set(found) == {Winner.CAND_1, Winner.CAND_2}
    assert 440 < found[Winner.CAND_1] < 560
    assert first_order(pair("p1", "a", "b")) is first_order(pair("p1", "c", "d"))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_by_name_over_files(tmp_path: Path) -> None:
    rows = prompt_rows(read_pair(PAIR_ROW))
    one, other = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", rows[0])
    assert read_labels([one, other]) == {"p/cand_1": Winner.CAND_1, "p/cand_2": Winner.CAND_2}
    for changed, word in (
        ({"better": "cand_3"}, "cand_3"),
        ({"better": None}, "says which reply is better"),
        ({"better": "tie"}, "stands twice"),
    ):
        with pytest.raises(UserError, match=word):
            read_labels([one, write(tmp_path / "c.jsonl", rows[0] | changed)])
