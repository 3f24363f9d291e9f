"""Bad lines are named, counted, and stop the run unless told otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from her_nemo.config.errors import UserError
from her_nemo.data.sources import read_jsonl, read_rows, read_span, spans


def messages(*roles: str) -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names.get(role, role), "content": f"text {i}"} for i, role in enumerate(roles)]


def sft(*roles: str, **changes: Any) -> dict[str, Any]:
    return {"trace_id": "t", "messages": messages(*(roles or "sua")), **changes}


def pair(**changes: Any) -> dict[str, Any]:
    return {"trace_id": "t", "messages": messages(*"su"), "chosen": "good", "rejected": "bad", **changes}


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_good_rows_of_each_kind(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", sft(*"sua"), b"", sft(*"suauaa"), sft(*"ua"), sft(extra=1))
    rows, report = read_jsonl(file, "sft")
    assert len(rows) == 4
    assert report.total == 0
    assert report.lines == 4
    assert len(read_jsonl(write(tmp_path / "b.jsonl", pair(label_flipped=True)), "pairs")[0]) == 1
    assert len(read_jsonl(write(tmp_path / "c.jsonl", sft(*"suau")), "prompts")[0]) == 1
    assert len(read_jsonl(write(tmp_path / "d.jsonl", {"text": "x <|endoftext|> y"}), "text")[0]) == 1


BAD_SFT = [
    ("invalid_json", b'{"trace_id": '),
    ("bad_encoding", b'{"trace_id": "\xff"}'),
    ("bad_encoding", b'{"trace_id":"t","messages":[{"role":"user","content":"\\ud800"}]}'),
    ("not_an_object", [1, 2]),
    ("missing_key", {"messages": messages(*"sua")}),
    ("missing_key", {"trace_id": "t"}),
    ("missing_key", {"trace_id": "t", "messages": [{"role": "user"}]}),
    ("wrong_type", sft(messages="hello")),
    ("wrong_type", sft(messages=["hello"])),
    ("wrong_type", sft(trace_id=7)),
    ("wrong_type", {"trace_id": "t", "messages": [{"role": "user", "content": None}]}),
    ("role_order", sft(messages=[])),
    ("role_order", sft(*"s")),
    ("role_order", sft(*"su")),
    ("role_order", sft(*"sau")),
    ("role_order", sft(*"sua", "tool")),
    ("role_order", sft(*"suua")),
    ("role_order", sft(*"susa")),
    ("empty_reply", sft(messages=[*messages(*"su"), {"role": "assistant", "content": " \n"}])),
    ("control_token", sft(messages=[*messages(*"su"), {"role": "assistant", "content": "a<|im_end|>b"}])),
]


@pytest.mark.parametrize(("kind", "row"), BAD_SFT)
def test_each_kind_of_bad_row(tmp_path: Path, kind: str, row: Any) -> None:
    file = write(tmp_path / "x.jsonl", sft(), row, sft())
    with pytest.raises(UserError, match=f"x.jsonl:2: {kind}: "):
        read_jsonl(file, "sft")
    rows, report = read_jsonl(file, "sft", skip_malformed=True)
    assert len(rows) == 2
    assert report.kinds == {kind: 1}


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("missing_key", sft(*"su")),
        ("empty_reply", pair(rejected="")),
        ("wrong_type", pair(chosen=["x"])),
        ("identical_pair", pair(rejected="good")),
        ("role_order", pair(messages=messages(*"sua"))),
    ],
)
def test_bad_pairs(tmp_path: Path, kind: str, row: Any) -> None:
    with pytest.raises(UserError, match=f"x.jsonl:1: {kind}: "):
        read_jsonl(write(tmp_path / "x.jsonl", row, pair()), "pairs")


def test_all_problems_in_one_error(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", sft(), *[b"{"] * 25, *[sft(*"su")] * 5)
    with pytest.raises(UserError) as caught:
        read_jsonl(file, "sft")
    text = str(caught.value)
    assert "30 of 31 lines malformed (25 invalid_json, 5 role_order)" in text
    assert "x.jsonl:2: " in text
    assert "x.jsonl:21: " in text
    assert "x.jsonl:22: " not in text
    assert "and 10 more" in text
    assert "skip_malformed" in text


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read data file .*none.jsonl: No such file"):
        read_jsonl(tmp_path / "none.jsonl", "sft")
    with pytest.raises(UserError, match="no usable sft rows"):
        read_jsonl(write(tmp_path / "e.jsonl"), "sft")
    with pytest.raises(UserError, match="no usable sft rows"):
        read_jsonl(write(tmp_path / "e.jsonl", b"{"), "sft", skip_malformed=True)


def test_her_files_are_good(shared_data: Path) -> None:
    assert len(read_jsonl(shared_data / "her" / "sft_single_turn_sample.jsonl", "sft")[0]) == 95
    assert len(read_jsonl(shared_data / "her" / "sft_multi_turn_sample.jsonl", "sft")[0]) == 29


@pytest.mark.parametrize("size", [1, 2, 3, 256])
def test_spans_read_one_after_the_other_are_the_file(tmp_path: Path, size: int) -> None:
    """Whatever stands between rows: blank lines, lone carriage returns, no line break at the end."""
    lines = [json.dumps(sft(), ensure_ascii=False).encode() for _ in range(5)]
    blob = lines[0] + b"\n\n" + lines[1] + b"\r\n" + b"{\r}\n" + lines[2] + b"\n \n" + lines[3] + b"\nx\n" + lines[4]
    file = tmp_path / "x.jsonl"
    file.write_bytes(blob)
    parts = [read_span(file, "sft", span) for span in spans(file, size)]
    assert sum(len(rows) for rows, _ in parts) == 5
    problems = [problem.split(":")[1] for _, report in parts for problem in report.problems]
    assert problems == ["4", "8"]
    assert sum(report.lines for _, report in parts) == 7


def test_parquet_rows_are_checked_and_named(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    good = [{**sft(), "extra": number} for number in range(7)]
    bad = {**sft(*"su"), "extra": 9}
    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([*good[:4], bad, *good[4:]]), file, row_group_size=3)
    with pytest.raises(UserError, match=r"1 of 8 lines malformed[^.]*\n.*x.parquet:5: role_order"):
        read_rows(file, "sft")
    rows, report = read_rows(file, "sft", skip_malformed=True)
    assert [row["extra"] for row in rows] == list(range(7))
    assert report.kinds == {"role_order": 1}
    (tmp_path / "y.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"y.parquet as Parquet"):
        read_rows(tmp_path / "y.parquet", "sft")
