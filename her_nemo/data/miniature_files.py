"""Writes a miniature world to disk: what the stages read, the tokenizer, and the oracle's facts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from her_nemo.data.miniature import Scene, Split, make_splits, sample_scenes
from her_nemo.data.miniature_flaws import SFT_RATES, flawed_reply, sample_flaws, sample_pair_flaws
from her_nemo.data.miniature_text import (
    PARTNER_LINES,
    gossip,
    lore,
    partner_lines,
    prompt_messages,
    rhyme,
    story,
)
from her_nemo.data.tokenizer import train_tokenizer

PRETRAIN_SHARES = {"story": 0.3, "lore": 0.23, "gossip": 0.2, "rhyme": 0.27}  # kinds of document
# Twins differ in their flaws only, as a person's correction of a reply would.
TWIN_SHARE = 0.7
LABEL_NOISE = 0.10  # share of training pairs whose labels are swapped; validation pairs have none


@dataclass(frozen=True)
class WorldSizes:
    """How many rows each file has, and the largest vocabulary."""

    pretrain: int = 15500
    sft_train: int = 4096
    sft_val: int = 128
    pairs_train: int = 2400
    pairs_val: int = 400
    prompts_train: int = 4096
    prompts_test: int = 400
    vocab_size: int = 1152


@dataclass(frozen=True)
class WorldSummary:
    """What was written: rows by file name, the vocabulary's size, and how many training labels swapped."""

    seed: int
    rows: dict[str, int]
    vocab_size: int
    labels_flipped: int


def write_world(out_dir: str | Path, seed: int, sizes: WorldSizes | None = None) -> WorldSummary:
    """Writes world `seed` under `out_dir`; the same seed and sizes give the same bytes.

    Only the files with `test` in their names come from the test split (see `make_splits`).
    """
    sizes = sizes or WorldSizes()
    out = Path(out_dir)
    (out / "oracle").mkdir(parents=True, exist_ok=True)
    train, test = make_splits(seed)
    documents = list(_pretrain_rows(seed, train, sizes.pretrain))
    sft_train = list(_sft_rows(seed, "sft-train", train, sizes.sft_train))
    pairs_train = list(_pair_rows(seed, "pairs-train", train, sizes.pairs_train, LABEL_NOISE))
    # Validation rows say whether the label was swapped (never, here); a training row must not tell.
    flipped = sum(row.pop("label_flipped") for row in pairs_train)
    test_scenes = list(sample_scenes(seed, "test", test, sizes.prompts_test))
    files: dict[str, Iterable[dict[str, Any]]] = {
        "pretrain.jsonl": documents,
        "sft_train.jsonl": sft_train,
        "sft_val.jsonl": _sft_rows(seed, "sft-val", train, sizes.sft_val),
        "pairs_train.jsonl": pairs_train,
        "pairs_val.jsonl": _pair_rows(seed, "pairs-val", train, sizes.pairs_val, 0.0),
        "prompts_train.jsonl": _prompt_rows(seed, sample_scenes(seed, "prompts", train, sizes.prompts_train)),
        "prompts_test.jsonl": _prompt_rows(seed, test_scenes),
        "partners_train.jsonl": _partner_rows(
            seed, train, sample_scenes(seed, "prompts", train, sizes.prompts_train)
        ),
        "partners_test.jsonl": _partner_rows(seed, test, test_scenes),
        "oracle/test_scenes.jsonl": (scene.to_json() for scene in test_scenes),
    }
    rows = {name: _write(out / name, content) for name, content in files.items()}
    tokenizer = train_tokenizer(_tokenizer_texts(documents, sft_train), out / "tokenizer", sizes.vocab_size)
    return WorldSummary(seed, rows, len(tokenizer), flipped)


def _pretrain_rows(seed: int, split: Split, count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"pretrain-words-{seed}")
    for scene in sample_scenes(seed, "pretrain", split, count):
        kind = rng.choices(tuple(PRETRAIN_SHARES), tuple(PRETRAIN_SHARES.values()))[0]
        if kind == "rhyme":
            text = rhyme(rng)
        else:
            text = {"story": story, "lore": lore, "gossip": gossip}[kind](rng, scene)
        yield {"text": text}


def _sft_rows(seed: int, purpose: str, split: Split, count: int) -> Iterator[dict[str, Any]]:
    for scene in sample_scenes(seed, purpose, split, count):
        rng = _words_rng(seed, scene)
        messages = prompt_messages(rng, scene)
        reply = flawed_reply(rng, scene, sample_flaws(rng, SFT_RATES))
        yield {"trace_id": scene.trace_id, "messages": [*messages, {"role": "assistant", "content": reply}]}


def _pair_rows(seed: int, purpose: str, split: Split, count: int, noise: float) -> Iterator[dict[str, Any]]:
    for scene in sample_scenes(seed, purpose, split, count):
        rng = _words_rng(seed, scene)
        messages = prompt_messages(rng, scene)
        better, worse = sample_pair_flaws(rng)
        # From the same random state both replies use the same wording as far as their flaws allow.
        twin = rng.random() < TWIN_SHARE
        state = rng.getstate()
        chosen = flawed_reply(rng, scene, better, split.names)
        if twin:
            rng.setstate(state)
        rejected = flawed_reply(rng, scene, worse, split.names)
        while rejected == chosen:  # both break off before the place where they differ
            rejected = flawed_reply(rng, scene, worse, split.names)
        flip = rng.random() < noise
        if flip:
            chosen, rejected = rejected, chosen
        yield {
            "trace_id": scene.trace_id,
            "messages": messages,
            "chosen": chosen,
            "rejected": rejected,
            "label_flipped": flip,
        }


def _prompt_rows(seed: int, scenes: Iterable[Scene]) -> Iterator[dict[str, Any]]:
    for scene in scenes:
        yield {"trace_id": scene.trace_id, "messages": prompt_messages(_words_rng(seed, scene), scene)}


def _partner_rows(seed: int, split: Split, scenes: Iterable[Scene]) -> Iterator[dict[str, Any]]:
    for scene in scenes:
        rng = random.Random(f"partner-{seed}-{scene.trace_id}")
        lines = partner_lines(rng, split, scene, PARTNER_LINES)
        yield {"trace_id": scene.trace_id, "partner": scene.speaker, "lines": lines}


def _words_rng(seed: int, scene: Scene) -> random.Random:
    return random.Random(f"words-{seed}-{scene.trace_id}")


def _tokenizer_texts(documents: list[dict[str, Any]], sft_rows: list[dict[str, Any]]) -> Iterator[str]:
    """Training text with a line break after every tag and mark.

    Qwen's split lets a word swallow one mark before it, so that `>Ada` would become a token of its own,
    unrelated to the character's other mentions. Kept apart here, it is written as `>` and `Ada`.
    """
    for row in documents:
        yield row["text"]
    for row in sft_rows:
        for message in row["messages"]:
            yield message["content"].replace(">", ">\n").replace("===", "\n===\n").replace("**", "\n**\n")
    for name in ("system", "user", "assistant"):
        yield f"{name}\n" * 5000


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
