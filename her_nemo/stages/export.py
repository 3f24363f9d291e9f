"""Megatron -> Hugging Face, and proof that it is the same model: every tensor, and the outputs of both.

Streamed: writing takes no more memory for a larger model. The directory gets its name, and its config.json, only when
the proof holds; until then it is `<out>.partial`, which nobody loads. A run that was cut off goes on from what it has.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tqdm import tqdm

from her_nemo.config.errors import UserError
from her_nemo.config.schema import ExportConfig
from her_nemo.data.tokenise import Tokeniser
from her_nemo.megatron import block_fp8, conversion, parallel, safetensors_files, streaming
from her_nemo.megatron.safetensors_files import INDEX_FILE
from her_nemo.megatron.single_layer import SingleLayer
from her_nemo.stages import export_adapter
from her_nemo.stages.export_adapter import PROOF_FILE
from her_nemo.training import checkpoint, proof, proof_fp8
from her_nemo.training import source as sources
from her_nemo.training.logging import quiet_transformers
from her_nemo.training.run import distributed


def run(cfg: ExportConfig) -> int:
    source = sources.locate(cfg.checkpoint, cfg.part, cfg.base)
    if source.lora is None and (cfg.lora == "adapter" or cfg.base is not None):
        raise UserError(f"{source.path}: its {cfg.part!r} has no LoRA adapters: leave lora and base out.")
    tokenizer = Path(cfg.tokenizer) if cfg.tokenizer else source.tokenizer
    if tokenizer is None:
        raise UserError(f"{source.path}: no tokenizer beside the weights. Set tokenizer=DIR.")
    tokeniser = Tokeniser(tokenizer)
    out, partial = Path(cfg.out), Path(f"{cfg.out}.partial")
    checkpoint.check_target(out, PROOF_FILE)
    quiet_transformers()
    with distributed(cfg):
        if cfg.lora == "adapter":
            failures = export_adapter.export(cfg, source, partial, out, tokeniser)
        else:
            failures = export_model(cfg, source, partial, out, tokeniser)
    if failures:
        raise UserError(
            f"{partial}: not the model that Megatron holds, so not exported: {'; '.join(failures)}"
        )
    return 0


def export_model(
    cfg: ExportConfig, source: sources.ModelSource, partial: Path, out: Path, tokeniser: Tokeniser
) -> list[str]:
    """Write, prove and name the directory (collective). Returns what does not hold, on every rank."""
    held = write(cfg, source, partial)
    found = prove(cfg, source, partial, held, tokeniser)
    if parallel.is_main():
        if found.failures:
            # What was written is not to be gone on with.
            (partial / streaming.IDENTITY).unlink(missing_ok=True)
        else:
            finish(cfg, source, partial, out, found, tokeniser)
    return parallel.broadcast_object(found.failures)


def write(cfg: ExportConfig, source: sources.ModelSource, partial: Path) -> dict[str, str]:
    """The weights as safetensors in `partial`. Returns the hash of every tensor as it was read (collective)."""
    share = conversion.Share(torch.distributed.get_rank(), torch.distributed.get_world_size())
    tensors = source.tensors()
    stored = conversion.plainly_stored(source.shape, source.head, _dtype(cfg))
    if cfg.dtype == "fp8":
        tensors = block_fp8.Quantised(tensors)
        stored = _in_order(tensors.stored(), list(stored))
    with tqdm(desc=cfg.name, unit="B", unit_scale=True, disable=None if parallel.is_main() else True) as bar:
        held = conversion.to_safetensors(
            tensors, partial, source.shape, source.head, _dtype(cfg), stored=stored,
            shard_bytes=cfg.shard_bytes, identity=source.identity(), share=share, watch=bar.update,
        )  # fmt: skip
    tensors.close()
    itemsize = {name: kind.itemsize for name, (_, kind) in stored.items()}
    files = conversion.tensor_files(stored, cfg.shard_bytes)
    if parallel.is_main() and len(files) > 1:
        (partial / INDEX_FILE).write_text(json.dumps(safetensors_files.index_of(files, itemsize), indent=2))
    return held


def prove(
    cfg: ExportConfig, source: sources.ModelSource, partial: Path, held: dict[str, str], tokeniser: Tokeniser
) -> proof.Findings:
    """Compare what lies in `partial` with what Megatron holds (collective; findings on global rank 0)."""
    dtype = _dtype(cfg)
    found = proof.Findings()
    how = parallel.broadcast_object(proof.method(cfg.proof, source.shape, source.head))
    if how == "layers" and parallel.tensor_size() * parallel.pipeline_size() > 1:
        raise UserError("proof=layers runs in one piece: leave model.tensor_model_parallel_size and pipeline at 1")
    found.body |= {"method": how, "head": source.head, "dtype": cfg.dtype}
    found.body["fingerprint"] = source.shape.fingerprint(source.head)
    found.body["source"] = {"path": str(source.path), **source.identity()}
    if parallel.is_main():
        # transformers wants it to load a model at all; without config.json nobody else takes it for one.
        (partial / "generation_config.json").write_text(json.dumps(_ends(tokeniser), indent=1) + "\n")
        proof.tensors_agree(partial, held, dtype, found)
        if cfg.dtype == "fp8":
            tensors = source.tensors()
            proof_fp8.weights_agree(partial, tensors, found)
            tensors.close()
    config = proof.hf_config(source.shape, source.head, dtype, _ends(tokeniser))
    beside = adapters_beside(cfg, source) if how == "full" else None
    if how == "full" and cfg.dtype == "fp8":
        model = sources.build(source, cfg.model, "32", head=source.head, trainable=False)
        outputs = proof.megatron_outputs(model)
        if beside is not None:
            proof.merging_agrees(beside, outputs, cfg.logits_tolerance, found)
        if parallel.is_main() and not found.failures:
            proof_fp8.outputs_close(partial, config, outputs, found)
    elif how == "full":
        # fp32 on both sides, with the weights as they were rounded: the same function to the last digits.
        model = sources.build(source, cfg.model, "32", head=source.head, trainable=False)
        if beside is not None:
            proof.merging_agrees(beside, proof.megatron_outputs(model), cfg.logits_tolerance, found)
        proof.round_weights(model, dtype)
        live = proof.live_hashes(model, dtype)
        outputs = proof.megatron_outputs(model)
        del model
        if parallel.is_main():
            written = {name: facts["sha256"] for name, facts in found.body["tensors"].items()}
            proof.compare_hashes("the live model", live, written, found)
            if not found.failures:
                proof.outputs_agree(partial, config, outputs, cfg.logits_tolerance, found)
    elif parallel.is_main() and not found.failures:
        single = SingleLayer(source.megatron_rows(), source.shape, source.head, dtype)
        tolerance = proof_fp8.LAYER_TOLERANCE if cfg.dtype == "fp8" else cfg.logits_tolerance
        proof.layers_agree(partial, config, single, cfg.proof_layers, tolerance, found)
        single.close()
    return found


def adapters_beside(cfg: ExportConfig, source: sources.ModelSource) -> torch.Tensor | None:
    """Outputs of a LoRA checkpoint as it was trained, its adapters beside the base's weights; None of others."""
    if source.lora is None or source.base is None:
        return None
    model = sources.build(
        source.base, cfg.model, "32", head=source.head, trainable=False, lora=source.lora, adapters=source
    )
    return proof.megatron_outputs(model)


def finish(
    cfg: ExportConfig,
    source: sources.ModelSource,
    partial: Path,
    out: Path,
    found: proof.Findings,
    tokeniser: Tokeniser,
) -> None:
    """Everything else that makes it a model, the proof among it; then the directory gets its name."""
    dtype = _dtype(cfg)
    tokeniser.hf.save_pretrained(partial)
    (partial / PROOF_FILE).write_text(json.dumps(found.body, indent=1) + "\n")
    config = source.shape.to_hf_config(head=source.head, dtype=dtype) | _ends(tokeniser)
    if cfg.dtype == "fp8":
        config["quantization_config"] = block_fp8.quantization_config(source.head)
    for leftover in [*partial.glob("done.*.jsonl"), partial / streaming.IDENTITY]:
        leftover.unlink(missing_ok=True)
    (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    checkpoint.replace_finished(partial, out)
    if found.body["method"] == "full":
        said = f"logits differ by {found.body['logits_max_abs_diff']:.2g} at most"
    else:
        layers = sum(place.isdigit() for place in found.body["layers"])
        gap = found.body["largest_relative_difference"]
        said = f"{layers} of {source.shape.num_layers} layers and the head differ by {gap:.2g} of their size at most"
    same = "every tensor the same"
    if cfg.dtype == "fp8":
        same = f"every weight within {found.body['fp8']['max_relative_error']:.2%}"
    print(f"{cfg.name}: {source.path} -> {out}; {same}, {said}; {out / PROOF_FILE}")


def _dtype(cfg: ExportConfig) -> torch.dtype:
    """The dtype of what is written plainly: with fp8, of everything but the layers' matrices."""
    return block_fp8.REST if cfg.dtype == "fp8" else getattr(torch, cfg.dtype)


def _in_order(stored: conversion.Stored, names: list[str]) -> conversion.Stored:
    """In the order of the model's tensors, the scales of each after it."""
    order = [key for name in names for key in (name, name + block_fp8.SCALE) if key in stored]
    return {key: stored[key] for key in order}


def _ends(tokeniser: Tokeniser) -> dict[str, int]:
    return {"eos_token_id": tokeniser.eos_id, "pad_token_id": tokeniser.pad_id}
