"""Hugging Face -> Megatron: a distributed checkpoint that any tensor- and pipeline-parallel layout can load."""

from __future__ import annotations

from pathlib import Path

from her_nemo.config.schema import ConvertConfig
from her_nemo.megatron import parallel, state
from her_nemo.training import checkpoint
from her_nemo.training import source as sources
from her_nemo.training.run import distributed


def run(cfg: ConvertConfig) -> int:
    source = sources.locate(cfg.source)
    out = Path(cfg.out)
    with distributed(cfg):
        model = sources.build(source, cfg.model, cfg.trainer.precision, head=source.head, trainable=False)
        checkpoint.write(
            out,
            step=0,
            save_tensors=lambda where: state.save(where / "model", model),
            models={"model": sources.describe(model)},
            counters={},
            config=cfg.model_dump(),
            tokenizer=source.tokenizer,
        )
        if parallel.is_main():
            print(f"{cfg.name}: {source.path} -> {out} ({model.fingerprint()})")
    return 0
