"""The token cache: the same tokens as without it, whoever encodes them, and after any kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from her_nemo.config.errors import UserError
from her_nemo.data import token_cache
from her_nemo.data.sources import read_rows, spans
from her_nemo.data.token_store import META, TokenStore
from her_nemo.data.tokenise import Sample, Tokeniser, encode_all
from her_nemo.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ROWS = 900  # four spans


def conversation(number: int) -> list[dict[str, str]]:
    turns = 1 + number % 4
    messages = [{"role": "system", "content": f"You are Ada from book {number // 4}."}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Odo: question {number} {turn}? é"})
        messages.append({"role": "assistant", "content": f"Ada: <role_action>nods</role_action> answer {turn}."})
    return messages[:-1]


REPLY = "<system_thinking>She waits for {}.</system_thinking>Ada: <role_thinking>I wait.</role_thinking> No {}."


def rows_of(kind: str, count: int = ROWS) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        messages, reply = conversation(number), REPLY.format(number, number)
        row: dict[str, Any] = {"trace_id": f"tr\u00e4ce-{number}", "messages": messages}
        if kind == "sft":
            row["messages"] = [*messages, {"role": "assistant", "content": reply}]
        if kind == "pairs":
            row |= {"chosen": reply, "rejected": "Ada: No."}
        rows.append(row)
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokeniser(tmp_path_factory: pytest.TempPathFactory) -> Tokeniser:
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [m["content"] for row in rows_of("sft", 40) for m in row["messages"]]
    train_tokenizer([*texts, "system user assistant"], directory, 500)
    return Tokeniser(directory)


def same(store: TokenStore[Any], expected: list[Any]) -> None:
    assert len(store) == len(expected)
    for got, wanted in zip(store, expected, strict=True):
        pairs = zip(got, wanted, strict=True) if isinstance(wanted, tuple) else [(got, wanted)]
        for a, b in pairs:
            assert type(a) is type(b)
            assert (a.trace_id, a.turns_dropped) == (b.trace_id, b.turns_dropped)
            assert a.token_ids.dtype == np.int32
            assert a.token_ids.tolist() == b.token_ids.tolist()
            if isinstance(a, Sample):
                assert a.prompt_length == b.prompt_length
                assert a.kinds.tolist() == b.kinds.tolist()


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != "lock"}


@pytest.mark.parametrize("kind", ["sft", "pairs", "prompts"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_store_gives_what_encoding_gives(tokeniser: Tokeniser, tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        write(path, rows_of(kind))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        # Row groups that do not end where spans do.
        parquet.write_table(pyarrow.Table.from_pylist(rows_of(kind)), path, row_group_size=170)
    directory = token_cache.prepare(path, kind, tokeniser, 90, tmp_path / "cache", workers=0)
    store = token_cache.load(directory, path, 90, False)
    expected, report = encode_all(token_cache.ENCODERS[kind], tokeniser, rows_of(kind), 90)
    same(store, expected)
    assert str(store.report) == str(report)
    assert report.shortened, "the test's length shortens nothing"
    same_item = encode_all(token_cache.ENCODERS[kind], tokeniser, rows_of(kind)[-1:], 90)[0]
    same(store[-1:], same_item)
    same(store[3:9:2], expected[3:9:2])
    with pytest.raises(IndexError):
        store[len(store)]


def test_lengths_and_order_do_not_depend_on_the_processes(tokeniser: Tokeniser, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", rows_of("sft"))
    alone = token_cache.prepare(path, "sft", tokeniser, 200, tmp_path / "alone", workers=0)
    ticks: list[float] = []
    several = token_cache.prepare(
        path, "sft", tokeniser, 200, tmp_path / "several", workers=2, tick=lambda: ticks.append(time.monotonic())
    )
    assert alone.name == several.name
    assert contents(alone) == contents(several)
    assert ticks
    assert max(np.diff(ticks), default=0) < 10
    store = TokenStore(alone, str(path))
    assert store.lengths.tolist() == [len(sample) for sample in store]


def test_second_run_reads_and_does_not_encode(
    tokeniser: Tokeniser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "data.jsonl", rows_of("sft", 20))
    directory = token_cache.prepare(path, "sft", tokeniser, 200, tmp_path / "cache")

    def fail(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(token_cache, "encode_span", fail)
    copy = tmp_path / "elsewhere" / "data.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    assert token_cache.prepare(copy, "sft", tokeniser, 200, tmp_path / "cache") == directory
    for changed in ("length", "kind", "content"):
        with pytest.raises(AssertionError, match="encoded again"):
            token_cache.prepare(
                write(tmp_path / "data2.jsonl", rows_of("sft", 21)) if changed == "content" else path,
                "prompts" if changed == "kind" else "sft",
                tokeniser,
                201 if changed == "length" else 200,
                tmp_path / "cache",
            )


def test_key_names_tokenizer_template_and_code(
    tokeniser: Tokeniser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = token_cache.made_of(tokeniser, "sft", 100)
    train_tokenizer(["other words altogether"], tmp_path, 300)
    assert token_cache.made_of(Tokeniser(tmp_path), "sft", 100)["tokenizer"] != before["tokenizer"]
    monkeypatch.setattr(token_cache, "CHAT_TEMPLATE", "another")
    assert token_cache.made_of(tokeniser, "sft", 100)["template"] != before["template"]
    package = tmp_path / "her_nemo"
    shutil.copytree(ROOT / "her_nemo", package)
    assert token_cache.code_digest(package) == before["code"]
    with (package / "roleplay" / "turn.py").open("a") as file:
        file.write("# changed\n")
    assert token_cache.code_digest(package) != before["code"]


KILLED = """
import sys, os, signal
from pathlib import Path
from her_nemo.data import token_cache
from her_nemo.data.tokenise import Tokeniser
path, tokenizer, cache, parts, workers = sys.argv[1:]
if __name__ == "__main__":
    def die():
        if len(list(Path(cache).glob("*/parts/*.npz"))) >= int(parts):
            os.kill(os.getpid(), signal.SIGKILL)
    token_cache.prepare(path, "sft", Tokeniser(tokenizer), 200, cache, workers=int(workers), tick=die)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_run_goes_on_where_it_was(
    tokeniser: Tokeniser, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "data.jsonl", rows_of("sft"))
    whole = token_cache.prepare(path, "sft", tokeniser, 200, tmp_path / "whole", workers=0)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    cache = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, str(script), str(path), str(tokeniser.directory), str(cache), "2", str(workers)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (entry,) = cache.iterdir()
    assert not (entry / META).exists()
    kept = {file.name: file.stat().st_mtime_ns for file in (entry / "parts").glob("*.npz")}
    assert len(kept) >= 2
    # A half-written part of the killed process is not taken for a whole one.
    (entry / "parts" / "0000003.npz.1.tmp").write_bytes(b"half")
    made: list[str] = []
    encode_span = token_cache.encode_span
    monkeypatch.setattr(
        token_cache, "encode_span", lambda t, job, file, span: (made.append(file.name), encode_span(t, job, file, span))
    )
    assert token_cache.prepare(path, "sft", tokeniser, 200, cache, workers=0) == entry
    assert set(made).isdisjoint(kept)
    assert len(made) + len(kept) == len(spans(path))
    assert contents(entry) == contents(whole)


def test_a_killed_worker_is_an_error_that_says_what_to_do(tokeniser: Tokeniser, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", rows_of("sft"))

    def kill_a_child() -> None:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        for child in children:
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                os.kill(int(child), signal.SIGKILL)

    with pytest.raises(UserError, match=r"ended suddenly.*run again.*num_workers"):
        token_cache.prepare(path, "sft", tokeniser, 200, tmp_path / "cache", workers=2, tick=kill_a_child)


def test_bad_lines_are_named_as_without_the_cache(tokeniser: Tokeniser, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", rows_of("sft", 600))
    lines = path.read_bytes().split(b"\n")
    for number in (5, 300, 599):
        lines[number - 1] = b"{"
    lines[9] = b""
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError) as plain:
        read_rows(path, "sft")
    directory = token_cache.prepare(path, "sft", tokeniser, 200, tmp_path / "cache", workers=0)
    with pytest.raises(UserError) as cached:
        token_cache.load(directory, path, 200, False)
    assert str(plain.value) == str(cached.value)
    assert "data.jsonl:300: invalid_json" in str(cached.value)
    store = token_cache.load(directory, path, 200, True)
    assert len(store) == 596
    assert store.malformed.total == 3
    hopeless = token_cache.prepare(path, "sft", tokeniser, 8, tmp_path / "cache", workers=0)
    with pytest.raises(UserError, match=r"no row fits in 8 tokens.*reply_too_long"):
        token_cache.load(hopeless, path, 8, True)


def test_damaged_or_missing_entries_are_refused(tokeniser: Tokeniser, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", rows_of("sft", 20))
    directory = token_cache.prepare(path, "sft", tokeniser, 200, tmp_path / "cache")
    with (directory / "tokens.npy").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(UserError, match="damaged"):
        TokenStore(directory, str(path))
    with pytest.raises(UserError, match="every process sees"):
        TokenStore(tmp_path / "nowhere", str(path))
    with pytest.raises(UserError, match="cannot read data file"):
        token_cache.prepare(tmp_path / "none.jsonl", "sft", tokeniser, 200, tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write token cache.*cache_dir"):
        token_cache.prepare(path, "sft", tokeniser, 200, tmp_path / "file")


def test_processes_that_encode_import_no_framework() -> None:
    """What a spawned process imports: the program that started it, and the module of the function it is handed."""
    program = (
        "import sys, her_nemo.__main__, her_nemo.data.token_cache\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'megatron.core', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
