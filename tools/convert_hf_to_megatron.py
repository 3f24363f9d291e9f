#!/usr/bin/env python
"""Hugging Face -> Megatron: `her-nemo convert` under the name people look for.

    python tools/convert_hf_to_megatron.py --hf-dir Qwen3-32B --out megatron --tp 8 --pp 4 --precision bf16-mixed
    torchrun --nproc-per-node 4 tools/convert_hf_to_megatron.py --hf-dir ... --out ...     # shares out the files

Streams: memory does not grow with the model, and a run that was cut off goes on. Further words are overrides of
`her-nemo convert`, e.g. model=qwen3_32b, which checks that the source has that shape.
"""

from __future__ import annotations

import argparse
import os
import sys

from her_nemo import cli
from her_nemo.config.compose import assign


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-dir", required=True, help="the Hugging Face directory to read")
    parser.add_argument("--out", required=True, help="the Megatron checkpoint directory to write")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size it will be trained with (any loads it)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel size it will be trained with")
    parser.add_argument("--precision", default="bf16-mixed", choices=["32", "bf16", "bf16-mixed"])
    parser.add_argument("overrides", nargs="*", help="further overrides of her-nemo convert")
    given = parser.parse_args()
    words = [
        assign("source", given.hf_dir),
        assign("out", given.out),
        f"model.tensor_model_parallel_size={given.tp}",
        f"model.pipeline_model_parallel_size={given.pp}",
        assign("trainer.precision", given.precision),
        f"trainer.devices={os.environ.get('LOCAL_WORLD_SIZE', '1')}",
        f"trainer.num_nodes={int(os.environ.get('WORLD_SIZE', '1')) // int(os.environ.get('LOCAL_WORLD_SIZE', '1'))}",
    ]
    return cli.main(["convert", *words, *given.overrides])


if __name__ == "__main__":
    sys.exit(main())
