"""A LoRA checkpoint -> a PEFT adapter directory, and proof that with its base it is what Megatron holds.

Like `stages/export.py`, of which this is the other half: the directory gets its name, and its adapter_config.json to
load by, only when the proof holds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from her_nemo.config.errors import UserError
from her_nemo.config.schema import ExportConfig
from her_nemo.data.tokenise import Tokeniser
from her_nemo.megatron import adapters, parallel, peft_files
from her_nemo.megatron.single_layer import SingleLayer
from her_nemo.training import checkpoint, proof
from her_nemo.training import source as sources

PROOF_FILE = "proof.json"


def export(cfg: ExportConfig, source: sources.ModelSource, partial: Path, out: Path, tokeniser: Tokeniser) -> list[str]:
    """Write, prove and name the directory (collective). Returns what does not hold, on every rank."""
    dtype = getattr(torch, cfg.dtype)
    found = proof.Findings()
    if parallel.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(source, partial, dtype, found)
    parallel.barrier()
    prove(cfg, source, partial, found)
    if parallel.is_main() and not found.failures:
        assert source.base is not None
        tokeniser.hf.save_pretrained(partial)
        (partial / PROOF_FILE).write_text(json.dumps(found.body, indent=1) + "\n")
        checkpoint.replace_finished(partial, out)
        print(f"{cfg.name}: {source.path} -> {out}; a PEFT adapter of {source.base.path}, proved in {out / PROOF_FILE}")
        if not source.base.is_hf:
            print(f"  peft wants that base in its Hugging Face form: her-nemo export checkpoint={source.base.path}")
    return parallel.broadcast_object(found.failures)


def write(source: sources.ModelSource, partial: Path, dtype: torch.dtype, found: proof.Findings) -> None:
    """Weights and configuration; the tensors on the disk, read again, against the checkpoint's."""
    assert source.lora is not None
    assert source.base is not None
    held, base = source.adapters(), source.base.tensors()
    peft_files.write(partial, held, base, dtype)
    hashes = {name: proof.digest_of(tensor, dtype) for name, tensor in peft_files.named(held, base)}
    held.close()
    base.close()
    settings = peft_files.config(source.lora, str(source.base.path.resolve()))
    (partial / peft_files.CONFIG_FILE).write_text(json.dumps(settings, indent=1) + "\n")
    proof.tensors_agree(partial, hashes, dtype, found)


def prove(cfg: ExportConfig, source: sources.ModelSource, partial: Path, found: proof.Findings) -> None:
    """transformers with the directory's numbers, by PEFT's rules, computes what Megatron does (collective)."""
    assert source.lora is not None
    assert source.base is not None
    dtype = getattr(torch, cfg.dtype)
    how = parallel.broadcast_object(proof.method(cfg.proof, source.shape, source.head))
    if how == "layers" and parallel.tensor_size() * parallel.pipeline_size() > 1:
        raise UserError("proof=layers runs in one piece: leave model.tensor_model_parallel_size and pipeline at 1")
    found.body |= {"method": how, "head": source.head, "dtype": cfg.dtype, "lora": source.lora.to_json()}
    found.body["fingerprint"] = source.shape.fingerprint(source.head)
    found.body["source"] = {"path": str(source.path), **source.identity()}
    found.body["base"] = {"path": str(source.base.path), "digest": sources.digest(source.base)}
    config = proof.hf_config(source.shape, source.head, torch.float32, {})
    outputs = None
    if how == "full":
        # The adapters beside the weights, as they were trained, rounded as they were written.
        model = sources.build(
            source.base, cfg.model, "32", head=source.head, trainable=False, lora=source.lora, adapters=source
        )
        for adapter in adapters.adapters_of(model).values():
            proof.round_parameters(adapter, dtype)
        outputs = proof.megatron_outputs(model)
        del model
    if not parallel.is_main() or found.failures:
        return
    written = peft_files.PeftTensors(source.base.tensors(), partial)
    if outputs is not None:
        proof.tensor_outputs_agree(written, config, outputs, cfg.logits_tolerance, found)
    else:
        single = SingleLayer(source.megatron_rows(dtype), source.shape, source.head, torch.float32)
        proof.written_layers_agree(written, config, single, cfg.proof_layers, cfg.logits_tolerance, found)
        single.close()
    written.close()
