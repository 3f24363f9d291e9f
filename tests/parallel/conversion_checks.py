"""What each process of a test of converting in several processes does."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from her_nemo.megatron import conversion, parallel
from her_nemo.megatron.conversion import Share, to_safetensors, to_torch_dist
from her_nemo.megatron.qwen3 import Qwen3Shape
from her_nemo.megatron.safetensors_files import HfTensors
from her_nemo.megatron.streaming import MegatronTensors


def there_and_back(args: dict[str, Any]) -> dict[str, Any]:
    """Convert args["source"] into args["out"]/megatron and that into args["out"]/hf.

    The rank args["dies"], if given, kills itself in the middle of its share of the first. Returns the names of the
    files that this rank wrote, and the hashes that all ranks were told.
    """
    parallel.initialize(seed=1)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    source, out = Path(args["source"]), Path(args["out"])
    shape, share = Qwen3Shape.from_hf_dir(source), Share(rank, world)
    written: list[str] = []
    for writer in ("DataFileWriter", "TensorFileWriter"):
        setattr(conversion, writer, _recorded(getattr(conversion, writer), written))

    def watch(_: int) -> None:
        if rank == args.get("dies") and len(written) > 1:
            os.kill(os.getpid(), signal.SIGKILL)

    held = HfTensors(source)
    files = to_torch_dist(
        held, out / "megatron", shape, "lm", "32", torch.float32, block_bytes=3000, file_bytes=20_000, share=share,
        watch=watch,
    )  # fmt: skip
    tensors = to_safetensors(
        MegatronTensors(out / "megatron", shape, "lm"), out / "hf", shape, "lm", torch.float32, shard_bytes=30_000,
        identity={}, block_bytes=3000, share=share,
    )  # fmt: skip
    parallel.destroy()
    return {"written": written, "files": files, "tensors": tensors}


def _recorded(writer: type, written: list[str]) -> type:
    class Recorded(writer):
        def __init__(self, path: Path, *rest: Any) -> None:
            written.append(path.name)
            super().__init__(path, *rest)

    return Recorded
