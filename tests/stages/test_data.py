"""`her-nemo data` as a user types it: the issue's commands on the public samples, and what a slip is answered with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stage_files import Place

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from ingest_files import SYSTEM, book, other_conversation, single_row, write

from her_nemo.data.records import read_parquet
from her_nemo.roleplay.views import Reader

ACCEPTANCE = [
    # source, file, turns in, samples
    ("coser", "coser/king_lear.json", 193, 152),
    ("coser", "coser/othello.json", 137, 118),
    ("coser", "coser/sharegpt_sample.json", 114, 114),
    ("coser", "coser/test_set_sample.json", 31, 25),
    ("her", "her/full_sample.jsonl", 123, 95),
    ("her", "her/sft_multi_turn_sample.jsonl", 95, 29),
    ("her", "her/sft_single_turn_sample.jsonl", 232, 95),
]


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, one clear message on stderr that has `words`, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("her-nemo: ")
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(("source", "file", "turns", "samples"), ACCEPTANCE)
def test_the_public_samples(
    her_nemo, shared_data: Path, tmp_path: Path, source: str, file: str, turns: int, samples: int
) -> None:
    done = her_nemo("data", "ingest", f"source={source}", f"path={shared_data / file}", "out=runs/x")
    assert done.returncode == 0, done.stderr
    assert "# Data card: x" in done.stdout
    assert f"turns: {turns} in = {turns} used + 0 quarantined, 0 unexplained" in done.stdout
    assert "runs/x/card.md" in done.stdout.splitlines()[-1]
    card = json.loads((tmp_path / "runs/x/card.json").read_text())
    assert card["counts"]["samples"] == samples
    assert card["patterns"]["entropy_bits"] > 0
    assert 0 < card["patterns"]["top1_share"] < 1
    assert (tmp_path / "runs/x/quarantine.jsonl").read_text() == ""


def test_samples_of_the_full_dataset_are_her_s_own(her_nemo, shared_data: Path, tmp_path: Path) -> None:
    """HER's single-turn file was made from the same conversations by HER's own rules."""
    path = f"path={shared_data / 'her/full_sample.jsonl'}"
    assert her_nemo("data", "ingest", "source=her", path, "out=x").returncode == 0
    ours = {row["trace_id"]: row for row in read_parquet(tmp_path / "x/samples.parquet")}
    lines = (shared_data / "her/sft_single_turn_sample.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(ours) == 95
    for row in map(json.loads, lines):
        mine = ours[row["trace_id"]]
        assert mine["messages"][1:] == row["messages"][1:]
        for key in ("original_trace_id", "turn_index", "history_turns"):
            assert mine[key] == row[key]


def test_no_thought_of_another_in_any_prompt(her_nemo, shared_data: Path, tmp_path: Path) -> None:
    thoughts: dict[str, set[str]] = {}
    for plot in json.loads((shared_data / "coser/king_lear.json").read_text(encoding="utf-8"))["plots"]:
        for talk in plot["conversation"]:
            for turn in talk["dialogues"]:
                found = re.findall(r"\[([^\]]{20,})\]", turn["message"])
                thoughts.setdefault(turn["character"], set()).update(found)
    done = her_nemo("data", "ingest", f"path={shared_data / 'coser/king_lear.json'}", "out=x")
    assert done.returncode == 0, done.stderr
    checked = 0
    for row in read_parquet(tmp_path / "x/samples.parquet"):
        prompt = "\n".join(message["content"] for message in row["messages"][:-1])
        for who, theirs in thoughts.items():
            if who != row["character"]:
                checked += len(theirs)
                assert not any(thought in prompt for thought in theirs - thoughts[row["character"]])
    assert checked > 10_000


def test_a_run_with_bad_rows_says_so(her_nemo, tmp_path: Path) -> None:
    talk: Any = other_conversation(2)
    talk["dialogues"][0]["message"] = None
    write(tmp_path / "lear.json", book(other_conversation(1), talk))
    done = her_nemo("data", "ingest", "path=lear.json", "out=x")
    assert done.returncode == 0, done.stderr
    assert "turns: 4 in = 2 used + 2 quarantined, 0 unexplained" in done.stdout
    assert "| wrong_type | 1 | 2 |" in done.stdout
    done = her_nemo("data", "inspect", "x/quarantine.jsonl")
    assert "lear.json:1 plots[1].conversation[0]" in done.stdout
    assert "wrong_type: 'dialogues[0].message' is null, not text" in done.stdout


def test_slips(her_nemo, tmp_path: Path) -> None:
    write(tmp_path / "lear.json", book())
    refused(her_nemo("data"), "data ingest | inspect")
    refused(her_nemo("data", "ingset"), "did you mean `data ingest`?")
    refused(her_nemo("data", "ingest", "path=lear.json"), "out: has to be given", "`data ingest`")
    refused(her_nemo("data", "ingest", "pth=lear.json", "out=x"), "did you mean path?")
    refused(her_nemo("data", "ingest", "path=nope.json", "out=x"), "nope.json: no such file")
    refused(her_nemo("data", "ingest", "source=cosr", "path=lear.json", "out=x"), "source: given 'cosr'")
    refused(her_nemo("data", "ingest", "source=her", "path=lear.json", "out=x"), "not a format that source=her knows")
    refused(her_nemo("data", "ingest", "path=no/such", "out=x"), "cannot load the dataset 'no/such'", "HF_HUB_OFFLINE")
    refused(her_nemo("data", "inspect", "nope.parquet"), "nope.parquet: no such file")
    refused(her_nemo("data", "inspect", "lear.json", "--row"), "--row needs a value")
    refused(her_nemo("data", "inspect", "lear.json", "--row", "9"), "no row 9, it has 1 (0 to 0)")
    refused(her_nemo("data", "inspect", "lear.json", "--row", "x"), "row: given 'x'")
    refused(her_nemo("data", "inspect", "lear.json", "--turn", "99"), "the conversation has 5 turns")
    refused(her_nemo("data", "inspect", "lear.json", "--colour"), "no option '--colour'")
    assert not (tmp_path / "x").exists()


def test_help_of_the_verbs(her_nemo) -> None:
    done = her_nemo("data", "ingest", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("her-nemo data ingest: ")
    assert "shares.rm_sft = 0.34" in done.stdout
    assert "row = 0" in her_nemo("data", "inspect", "--help").stdout


def test_inspect_shows_segments_masks_and_every_view(her_nemo, tmp_path: Path, place: Place) -> None:
    file = write(tmp_path / "s.jsonl", [single_row(0), single_row(1)])
    done = her_nemo("data", "inspect", file.name, "--row", "1", "width=200")
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    for reader in Reader:
        assert reader.value in shown
    for words in ("system (masked)", "trained reply", "system_thinking │", "role_thinking   │", "speech"):
        assert words in shown
    other = shown.split("other_character")[1]
    assert "hides system_thinking" in other
    coloured = her_nemo("data", "inspect", file.name, "--row=1", "width=200", FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[" in coloured.stdout
    assert "\x1b[36m<role_thinking>lie</role_thinking>" in coloured.stdout
    assert "\x1b[35m<system_thinking>Edmund lies.</system_thinking>" in coloured.stdout
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured.stdout) == shown
    tokens = her_nemo("data", "inspect", file.name, "--tokenizer", str(place.world / "tokenizer"))
    assert re.search(r"\d+ trained tokens: \d+ system_thinking, \d+ role_thinking, \d+ speech", tokens.stdout)


def test_inspect_reads_what_ingest_wrote(her_nemo, tmp_path: Path) -> None:
    write(tmp_path / "lear.json", book(*[other_conversation(n) for n in range(30)]))
    assert her_nemo("data", "ingest", "path=lear.json", "out=x").returncode == 0
    done = her_nemo("data", "inspect", "x/conversations.parquet", "--row", "3")
    assert "speech number 3" in done.stdout
    assert "2 turns" in done.stdout
    done = her_nemo("data", "inspect", "x/conversations.parquet", "--turn", "0")
    assert "judge_grm" in done.stdout
    prompt = her_nemo("data", "inspect", "x/splits/roleplay_rl.parquet")
    assert "reference (not in the prompt)" in prompt.stdout
    pair = {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hm?"}]}
    write(tmp_path / "p.jsonl", [{**pair, "trace_id": "p", "chosen": "Edmund: A.", "rejected": "Edmund: B."}])
    shown = her_nemo("data", "inspect", "p.jsonl").stdout
    assert "chosen" in shown
    assert "rejected" in shown
