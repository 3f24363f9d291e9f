#!/usr/bin/env python
"""Megatron -> Hugging Face, proved: `her-nemo export` under the name people look for.

    python tools/export_to_hf.py --checkpoint runs/ppo --out hf                  # a run directory takes its latest
    python tools/export_to_hf.py --checkpoint runs/ppo --part critic --out critic
    torchrun --nproc-per-node 4 tools/export_to_hf.py --checkpoint ... --out ...  # shares out the files

Streams: memory does not grow with the model, and a run that was cut off goes on. `out` appears when its proof holds.
Further words are overrides of `her-nemo export`, e.g. proof=layers, shard_bytes=2000000000.
"""

from __future__ import annotations

import argparse
import os
import sys

from her_nemo import cli
from her_nemo.config.compose import assign


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="the Megatron checkpoint, or a run directory")
    parser.add_argument("--out", required=True, help="the Hugging Face directory to write")
    parser.add_argument("--part", default="model", help="which model of the checkpoint: model, or PPO's critic")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16", "fp8"])
    parser.add_argument("--tokenizer", help="tokenizer directory; default: the one in the checkpoint")
    parser.add_argument("overrides", nargs="*", help="further overrides of her-nemo export")
    given = parser.parse_args()
    words = [
        assign("checkpoint", given.checkpoint),
        assign("out", given.out),
        assign("part", given.part),
        f"dtype={given.dtype}",
        f"trainer.devices={os.environ.get('LOCAL_WORLD_SIZE', '1')}",
        f"trainer.num_nodes={int(os.environ.get('WORLD_SIZE', '1')) // int(os.environ.get('LOCAL_WORLD_SIZE', '1'))}",
    ]
    if given.tokenizer:
        words.append(assign("tokenizer", given.tokenizer))
    return cli.main(["export", *words, *given.overrides])


if __name__ == "__main__":
    sys.exit(main())
