"""Two checkpoints compared tensor by tensor, each Hugging Face or Megatron: what differs first, and where."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm import tqdm

from her_nemo.config.schema import VerifyConfig
from her_nemo.megatron import platform
from her_nemo.megatron.qwen3_map import LM_HEAD, hf_shapes
from her_nemo.megatron.streaming import BLOCK_BYTES, BlockMemory, Tensors, row_blocks, row_bytes_of
from her_nemo.training import source as sources

DIFFERENT = 1
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@dataclass(frozen=True)
class Difference:
    """How one tensor differs."""

    name: str
    what: str


def run(cfg: VerifyConfig) -> int:
    """0 if the two hold the same model, 1 if not."""
    platform.apply()
    one, other = (sources.locate(path, _part(path, cfg.part)) for path in (cfg.a, cfg.b))
    a, b = one.tensors(), other.tensors()
    order = list(hf_shapes(one.shape, one.head))
    order += sorted((a.names() | b.names()) - set(order))
    # Where embeddings are tied, a head that is stored again has been checked to be the embedding.
    skipped = {LM_HEAD} if one.shape.tied and other.shape.tied and one.head == other.head == "lm" else set()
    differences, rounded, memory = [], set(), BlockMemory()
    for name in tqdm([name for name in order if name not in skipped], desc=cfg.name, unit="tensor", disable=None):
        found = compare(name, a, b, memory)
        if isinstance(found, Difference):
            differences.append(found)
        elif found:
            rounded.add(found)
    a.close()
    b.close()
    settings = [f"{key}: {mine!r} and {theirs!r}" for key, mine, theirs in _settings(one, other) if mine != theirs]
    if not differences and not settings:
        how = f"equal after rounding to {', '.join(sorted(rounded))}" if rounded else "equal bit for bit"
        print(f"{cfg.name}: {one.path} and {other.path}: {len(order) - len(skipped)} tensors, {how}")
        return 0
    print(f"{cfg.name}: {one.path} and {other.path} are not the same model")
    for line in settings:
        print(f"  config: {line}")
    if differences:
        print(f"  first tensor that differs: {differences[0].name}: {differences[0].what}")
        for difference in differences[1:]:
            print(f"  {difference.name}: {difference.what}")
        print(f"  {len(differences)} of {len(order) - len(skipped)} tensors differ")
    return DIFFERENT


def _part(path: str, part: str) -> str:
    """Hugging Face directories have one model, whatever it is called."""
    return "model" if sources.is_hf(path) else part


def _settings(one: sources.ModelSource, other: sources.ModelSource) -> list[tuple[str, object, object]]:
    """What the two configurations say that tensors do not show."""
    keys = ("tied", "rotary_base", "layernorm_epsilon", "num_attention_heads", "num_query_groups", "kv_channels")
    found: list[tuple[str, object, object]] = [(key, vars(one.shape)[key], vars(other.shape)[key]) for key in keys]
    if one.head == other.head == "scalar":
        found = found[1:]
    return [("head", one.head, other.head), *found]


def compare(name: str, a: Tensors, b: Tensors, memory: BlockMemory, block_bytes: int = BLOCK_BYTES) -> Difference | str:
    """How a tensor differs; else "" if it is the same bit for bit, or the dtype it is the same in after rounding."""
    for held, which in ((a, "second"), (b, "first")):
        if name not in held.names():
            return Difference(name, f"only in the {which}")
    if a.shape(name) != b.shape(name):
        return Difference(name, f"shapes {a.shape(name)} and {b.shape(name)}")
    dtype, rounded = _common(a.dtype(name), b.dtype(name))
    shape = a.shape(name)
    count, largest, first = 0, 0.0, ""
    for start, stop in row_blocks(shape[0], row_bytes_of(shape, torch.float32), block_bytes):
        mine, theirs = (memory.read(held, name, start, stop, held.dtype(name)).to(dtype) for held in (a, b))
        # Bits, not values: -0 is not 0, and NaN may be itself.
        if torch.equal(mine.view(_BITS[dtype]), theirs.view(_BITS[dtype])):
            continue
        unequal = mine.view(_BITS[dtype]) != theirs.view(_BITS[dtype])
        if not first:
            place = unequal.nonzero()[0].tolist()
            values = f"{mine[tuple(place)].item():.6g} and {theirs[tuple(place)].item():.6g}"
            first = f"at {[place[0] + start, *place[1:]]}: {values}"
        count += int(unequal.sum())
        largest = max(largest, float((mine.float() - theirs.float()).abs().nan_to_num(float("inf")).max()))
    if not count:
        return str(dtype).removeprefix("torch.") if rounded else ""
    total = torch.Size(shape).numel()
    return Difference(name, f"{first}; {count} of {total} numbers differ, by {largest:.3g} at most")


def _common(a: torch.dtype, b: torch.dtype) -> tuple[torch.dtype, bool]:
    """The dtype to compare in: the narrower, where one was rounded from the other; and whether one has to be."""
    if a == b:
        return a, False
    if torch.float32 in (a, b):
        return (b if a == torch.float32 else a), True
    # bfloat16 and float16 hold different numbers: fp32 holds both.
    return torch.float32, True
