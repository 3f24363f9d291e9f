"""Hugging Face -> Megatron: a distributed checkpoint that any tensor- and pipeline-parallel layout can load.

Streamed: memory does not grow with the model. Until everything is there the directory is `<out>.partial`, without a
manifest; a run that was cut off goes on from what it has.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from her_nemo.config.schema import ConvertConfig
from her_nemo.megatron import conversion, parallel, qwen3, weights
from her_nemo.megatron.precision import precision
from her_nemo.megatron.safetensors_files import HfTensors
from her_nemo.training import checkpoint
from her_nemo.training import source as sources
from her_nemo.training.run import distributed


def run(cfg: ConvertConfig) -> int:
    source = sources.locate(cfg.source)
    out, partial = Path(cfg.out), Path(f"{cfg.out}.partial")
    settings = precision(cfg.trainer.precision)
    tensor, pipeline = cfg.model.tensor_model_parallel_size, cfg.model.pipeline_model_parallel_size
    qwen3.check_layout(source.shape, tensor, pipeline)
    checkpoint.check_target(out, checkpoint.MANIFEST)
    tokenizer = Path(cfg.model.tokenizer.path) if cfg.model.tokenizer.path else source.tokenizer
    held = HfTensors(source.path)
    weights.check_hf(held, source.shape, source.head)
    with distributed(cfg, split=False):
        share = conversion.Share(torch.distributed.get_rank(), torch.distributed.get_world_size())
        with tqdm(desc=cfg.name, unit="B", unit_scale=True, disable=None if parallel.is_main() else True) as bar:
            files = conversion.to_torch_dist(
                held, partial / "model", source.shape, source.head, settings.name, settings.params_dtype,
                tensor=tensor, file_bytes=cfg.shard_bytes, share=share, watch=bar.update,
            )  # fmt: skip
        if parallel.is_main():
            if tokenizer is not None:
                checkpoint.copy_tokenizer(tokenizer, partial)
            fingerprint = source.shape.fingerprint(source.head)
            checkpoint.seal(
                partial,
                0,
                models={"model": {"shape": asdict(source.shape), "head": source.head, "fingerprint": fingerprint}},
                counters={},
                config=cfg.model_dump(),
                known={f"model/{name}": facts for name, facts in files.items()},
            )
            checkpoint.replace_finished(partial, out)
            size = sum(facts["bytes"] for facts in files.values())
            print(f"{cfg.name}: {source.path} -> {out} ({size / 1e9:.2f} GB, {fingerprint})")
            print(f"  her-nemo verify {source.path} {out}   compares them tensor by tensor")
        parallel.barrier()
    held.close()
    return 0
