"""Tokens per second from a JSON-lines file to packed rows: our token cache against plain Hugging Face `datasets.map`.

    python benchmarks/data.py [--data FILE] [--tokenizer DIR] [--processes 1 2] [--runs 3] [--json FILE]

All ways start from the file and end with rows of at most `--length` tokens, in one run, taking turns; medians are
printed, by the clock and by processor time, which other work on the machine hardly touches. "map" calls the chat
template for one row at a time, as TRL's SFTTrainer does; "map batched" for 1000 rows at a time. Both are then packed
as TRL packs: best fit decreasing in batches of 1000, over Arrow tables. Ours does more: it checks every row, gives
every token its segment kind, drops whole turns where rows are too long (the others cut), and keeps what it made on
disk. "ours, again" is a second run that finds the cache.

Without --data: HER's sample (from the shared test data, if they are there), repeated with a mark in every message so
that no two copies share text; and the miniature world's SFT file. Without --tokenizer: one trained on the data.
"""

from __future__ import annotations

import os

# One core a process: else the tokenizers' own threads would hide what is compared. Before tokenizers is imported.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from her_nemo.data import token_cache
from her_nemo.data.sources import read_rows
from her_nemo.data.tokenise import Tokeniser

# torch and transformers are imported where they are used: processes that encode import this file again.

BATCH = 1000  # rows packed together, as in TRL


def main() -> int:
    options = parse()
    # Not in anybody's time.
    import datasets  # noqa: F401
    import torch  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="her_nemo_bench_") as scratch:
        found = []
        for name, path in corpora(options, Path(scratch)).items():
            tokenizer = options.tokenizer or trained_tokenizer(path, Path(scratch) / f"{name}_tokenizer")
            found.append(compare(name, path, tokenizer, options, Path(scratch)))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": found}, indent=1) + "\n")
        print(f"figures are in {options.json}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="SFT rows: trace_id, messages")
    parser.add_argument("--tokenizer", type=Path, help="a Hugging Face tokenizer directory")
    parser.add_argument("--length", type=int, default=8192, help="longest row, tokens")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="how many, one comparison each")
    parser.add_argument("--runs", type=int, default=3, help="runs of each way; medians are printed")
    parser.add_argument("--copies", type=int, default=20, help="copies of HER's sample")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


# ---------------------------------------------------------------- what is encoded


def corpora(options: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    """Files of SFT rows by name."""
    from her_nemo.data.miniature_files import WorldSizes, write_world

    if options.data:
        return {options.data.stem: options.data}
    found: dict[str, Path] = {}
    places = [os.environ.get("HER_NEMO_SHARED_DATA"), ROOT.parent / "shared/data", "/work/shared/data"]
    samples = [Path(place) / "her/sft_single_turn_sample.jsonl" for place in places if place]
    sample = next((file for file in samples if file.is_file()), None)
    if sample:
        found["her_single_turn"] = scratch / "her_single_turn.jsonl"
        repeat(sample, found["her_single_turn"], options.copies)
    else:
        print("HER's sample is not here: the miniature world alone")
    sizes = WorldSizes(pretrain=400, pairs_train=8, pairs_val=8, prompts_train=8, prompts_test=8)
    write_world(scratch / "world", 0, sizes)
    return found | {"miniature": scratch / "world" / "sft_train.jsonl"}


def repeat(sample: Path, out: Path, copies: int) -> None:
    rows, _ = read_rows(sample, "sft")
    with out.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for row in rows:
                messages = [{**m, "content": f"{m['content']} {copy}"} for m in row["messages"]]
                row = {"trace_id": f"{row['trace_id']}-{copy}", "messages": messages}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def trained_tokenizer(path: Path, out: Path) -> Path:
    from her_nemo.data.tokenizer import train_tokenizer

    rows, _ = read_rows(path, "sft")
    train_tokenizer((m["content"] for row in rows[:400] for m in row["messages"]), out, 8192)
    return out


# ---------------------------------------------------------------- the ways


def ours(path: Path, tokenizer: Path, length: int, processes: int, work: Path) -> int:
    """Token cache, then packed micro-batches as tensors."""
    from her_nemo.data.packing import packed_micro_batches

    tokeniser = Tokeniser(tokenizer)
    entry = token_cache.prepare(path, "sft", tokeniser, length, work, workers=processes)
    store: Any = token_cache.load(entry, path, length, False)
    for begin in range(0, len(store), BATCH):
        indices = range(begin, min(begin + BATCH, len(store)))
        packed_micro_batches(store, indices, dp_rank=0, dp_size=1, capacity=length, pad_id=tokeniser.pad_id)
    return int(store.lengths.sum())


def hugging_face(path: Path, tokenizer: Path, length: int, processes: int, work: Path, batched: bool) -> int:
    """`datasets.map` over the rows, then TRL-style packing."""
    import datasets

    datasets.disable_progress_bars()
    hf = Tokeniser(tokenizer).hf
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(work))

    def encode(messages: list[dict[str, str]]) -> dict[str, list[int]]:
        prompt = hf.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        reply = [*hf(messages[-1]["content"], add_special_tokens=False)["input_ids"], hf.eos_token_id]
        return {"input_ids": prompt + reply, "completion_mask": [0] * len(prompt) + [1] * len(reply)}

    def encode_batch(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        chats = batch["messages"]
        prompts = hf.apply_chat_template(
            [messages[:-1] for messages in chats], add_generation_prompt=True, return_dict=False
        )
        replies = hf([messages[-1]["content"] for messages in chats], add_special_tokens=False)["input_ids"]
        return {
            "input_ids": [p + r + [hf.eos_token_id] for p, r in zip(prompts, replies, strict=True)],
            "completion_mask": [[0] * len(p) + [1] * (len(r) + 1) for p, r in zip(prompts, replies, strict=True)],
        }

    how: dict[str, Any] = {
        "remove_columns": rows.column_names, "num_proc": processes if processes > 1 else None
    }  # fmt: skip
    if batched:
        encoded = rows.map(encode_batch, batched=True, **how)
    else:
        encoded = rows.map(lambda row: encode(row["messages"]), **how)
    packed = encoded.with_format("arrow").map(lambda table: trl_pack(table, length), batched=True, batch_size=BATCH)
    return sum(len(ids) for ids in packed.with_format("numpy")["input_ids"])


def trl_pack(table: Any, length: int) -> Any:
    """What TRL's `pack_dataset(strategy="bfd")` does to an Arrow table: cut, best fit decreasing, take, new offsets."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = {name: pc.list_slice(table[name].combine_chunks(), 0, length) for name in table.column_names}
    lengths = pc.list_value_length(columns["input_ids"]).to_numpy()
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[index])
        at = bisect_left(room, (size, -1))
        free, row = room.pop(at) if at < len(room) else (length, len(bins))
        if row == len(bins):
            bins.append([])
        bins[row].append(index)
        insort(room, (free - size, row))
    order = [index for row in bins for index in row]
    offsets = np.cumsum([0, *(int(lengths[row].sum()) for row in bins)]).astype(np.int32)
    out = {
        name: pa.ListArray.from_arrays(pa.array(offsets), pc.take(column, pa.array(order)).flatten())
        for name, column in columns.items()
    }
    borders = np.cumsum([0, *map(len, bins)]).astype(np.int32)
    out["seq_lengths"] = pa.ListArray.from_arrays(pa.array(borders), pa.array(lengths[order]))
    return pa.table(out)


# ---------------------------------------------------------------- timing


def compare(name: str, path: Path, tokenizer: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Time every way `--runs` times in turn and print the medians."""
    size = path.stat().st_size / 1e6
    print(f"\n{name}: {size:.1f} MB, rows of {options.length} tokens, median of {options.runs} runs in turn")
    table = []
    for processes in options.processes:
        common = (path, tokenizer, options.length, processes)
        ways: dict[str, Callable[[Path], int]] = {
            "map": lambda work, common=common: hugging_face(*common, work, batched=False),
            "map batched": lambda work, common=common: hugging_face(*common, work, batched=True),
            "ours": lambda work, common=common: ours(*common, work),
        }
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in [*ways, "ours, again"]}
        tokens: dict[str, int] = {}
        work = scratch / "work"
        for _ in range(options.runs):
            for way, run in ways.items():
                tokens[way] = timed(run, work, times[way])
                if way == "ours":
                    tokens["ours, again"] = timed(run, work, times["ours, again"])
                shutil.rmtree(work)
        wall, cpu = (
            {way: tokens[way] / statistics.median(run[i] for run in times[way]) for way in times} for i in (0, 1)
        )
        for way in times:
            line = {
                "way": way, "processes": processes, "tokens": tokens[way], "seconds_wall_and_processor": times[way],
                "tokens_per_second": wall[way], "tokens_per_processor_second": cpu[way],
                "ours_over_it": wall["ours"] / wall[way], "ours_over_it_processor": cpu["ours"] / cpu[way],
            }  # fmt: skip
            table.append(line)
            print(
                f"  {processes} process{'es' if processes > 1 else '':2}  {way:12}"
                f" {wall[way] / 1e3:7.0f} k tokens/s, ours {line['ours_over_it']:5.2f} x"
                f"   {cpu[way] / 1e3:7.0f} k a processor second, ours {line['ours_over_it_processor']:5.2f} x",
                flush=True,
            )
    return {"corpus": name, "megabytes": size, "length": options.length, "ways": table}


def timed(run: Callable[[Path], int], work: Path, times: list[tuple[float, float]]) -> int:
    begin, used = time.perf_counter(), processor_seconds()
    tokens = run(work)
    times.append((time.perf_counter() - begin, processor_seconds() - used))
    return tokens


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def machine() -> dict[str, Any]:
    packages = ("tokenizers", "transformers", "datasets", "pyarrow", "numpy")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


if __name__ == "__main__":
    sys.exit(main())
