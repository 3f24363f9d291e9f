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
from her_nemo.megatron import conversion, parallel, safetensors_files, streaming
from her_nemo.megatron.qwen3_map import hf_shapes
from her_nemo.megatron.safetensors_files import INDEX_FILE
from her_nemo.megatron.single_layer import SingleLayer
from her_nemo.training import checkpoint, proof
from her_nemo.training import source as sources
from her_nemo.training.logging import quiet_transformers
from her_nemo.training.run import distributed

PROOF_FILE = "proof.json"


def run(cfg: ExportConfig) -> int:
    source = sources.locate(cfg.checkpoint, cfg.part)
    tokenizer = Path(cfg.tokenizer) if cfg.tokenizer else source.tokenizer
    if tokenizer is None:
        raise UserError(f"{source.path}: no tokenizer beside the weights. Set tokenizer=DIR.")
    tokeniser = Tokeniser(tokenizer)
    out, partial = Path(cfg.out), Path(f"{cfg.out}.partial")
    checkpoint.check_target(out, PROOF_FILE)
    quiet_transformers()
    with distributed(cfg):
        held = write(cfg, source, partial)
        found = prove(cfg, source, partial, held, tokeniser)
        if parallel.is_main():
            if found.failures:
                # What was written is not to be gone on with.
                (partial / streaming.IDENTITY).unlink(missing_ok=True)
            else:
                finish(cfg, source, partial, out, found, tokeniser)
        failures = parallel.broadcast_object(found.failures)
    if failures:
        raise UserError(
            f"{partial}: not the model that Megatron holds, so not exported: {'; '.join(failures)}"
        )
    return 0


def write(cfg: ExportConfig, source: sources.ModelSource, partial: Path) -> dict[str, str]:
    """The weights as safetensors in `partial`. Returns the hash of every tensor as it was read (collective)."""
    share = conversion.Share(torch.distributed.get_rank(), torch.distributed.get_world_size())
    tensors = source.tensors()
    with tqdm(desc=cfg.name, unit="B", unit_scale=True, disable=None if parallel.is_main() else True) as bar:
        held = conversion.to_safetensors(
            tensors, partial, source.shape, source.head, getattr(torch, cfg.dtype),
            shard_bytes=cfg.shard_bytes, identity=source.identity(), share=share, watch=bar.update,
        )  # fmt: skip
    tensors.close()
    itemsize = getattr(torch, cfg.dtype).itemsize
    files = safetensors_files.shards(hf_shapes(source.shape, source.head), itemsize, cfg.shard_bytes)
    if parallel.is_main() and len(files) > 1:
        (partial / INDEX_FILE).write_text(json.dumps(safetensors_files.index_of(files, itemsize), indent=2))
    return held


def prove(
    cfg: ExportConfig, source: sources.ModelSource, partial: Path, held: dict[str, str], tokeniser: Tokeniser
) -> proof.Findings:
    """Compare what lies in `partial` with what Megatron holds (collective; findings on global rank 0)."""
    dtype = getattr(torch, cfg.dtype)
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
    config = proof.hf_config(source.shape, source.head, dtype, _ends(tokeniser))
    if how == "full":
        # fp32 on both sides, with the weights as they were rounded: the same function to the last digits.
        model = sources.build(source, cfg.model, "32", head=source.head, trainable=False)
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
        single = SingleLayer(source.path / source.part, source.shape, source.head, dtype)
        proof.layers_agree(partial, config, single, cfg.proof_layers, cfg.logits_tolerance, found)
        single.close()
    return found


def finish(
    cfg: ExportConfig,
    source: sources.ModelSource,
    partial: Path,
    out: Path,
    found: proof.Findings,
    tokeniser: Tokeniser,
) -> None:
    """Everything else that makes it a model, the proof among it; then the directory gets its name."""
    dtype = getattr(torch, cfg.dtype)
    tokeniser.hf.save_pretrained(partial)
    (partial / PROOF_FILE).write_text(json.dumps(found.body, indent=1) + "\n")
    config = source.shape.to_hf_config(head=source.head, dtype=dtype) | _ends(tokeniser)
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
    print(f"{cfg.name}: {source.path} -> {out}; every tensor the same, {said}; {out / PROOF_FILE}")


def _ends(tokeniser: Tokeniser) -> dict[str, int]:
    return {"eos_token_id": tokeniser.eos_id, "pad_token_id": tokeniser.pad_id}
