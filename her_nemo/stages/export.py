"""Megatron -> Hugging Face, and proof that it is the same model: every tensor bit for bit, and the outputs of both.

The directory gets its name only when the proof holds; until then it is `<out>.partial`, which nobody loads.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from her_nemo.config.errors import UserError
from her_nemo.config.schema import ExportConfig
from her_nemo.data.tokenise import Tokeniser
from her_nemo.megatron import forward, parallel, weights
from her_nemo.megatron.qwen3 import Model
from her_nemo.training import source as sources
from her_nemo.training.logging import quiet_transformers
from her_nemo.training.run import distributed

PROOF_FILE = "proof.json"
PROBES, PROBE_LENGTH, PROBE_SEED = 4, 96, 20_601


def run(cfg: ExportConfig) -> int:
    source = sources.locate(cfg.checkpoint)
    tokenizer = Path(cfg.tokenizer) if cfg.tokenizer else source.tokenizer
    if tokenizer is None:
        raise UserError(f"{source.path}: no tokenizer beside the weights. Set tokenizer=DIR.")
    out, partial = Path(cfg.out), Path(f"{cfg.out}.partial")
    dtype = getattr(torch, cfg.dtype)
    quiet_transformers()
    with distributed(cfg):
        model = sources.build(source, cfg.model, cfg.trainer.precision, head=source.head, trainable=False)
        if parallel.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        parallel.barrier()
        weights.save_hf(model, partial, dtype=dtype, shard_bytes=cfg.shard_bytes)
        held = {name: digest(tensor.to(dtype)) for name, tensor in weights.hf_tensors(model)}
        tokens = probe_tokens(model.shape.vocab_size)
        outputs = (
            forward.logits(model, tokens)
            if model.head == "lm"
            else forward.values(model, [{"tokens_BS": tokens}])[0]
        )
        failures: list[str] = []
        if parallel.is_main():
            proof, failures = prove(partial, model, tokens, outputs.cpu(), held, cfg)
            if not failures:
                finish(partial, out, proof, Tokeniser(tokenizer))
                print(
                    f"{cfg.name}: {source.path} -> {out}; logits differ by {proof['logits_max_abs_diff']:.2g} at most"
                )
        failures = parallel.broadcast_object(failures)
    if failures:
        raise UserError(
            f"{partial}: not the model that Megatron holds, so not exported: {'; '.join(failures)}"
        )
    return 0


def prove(
    directory: Path,
    model: Model,
    tokens: torch.Tensor,
    outputs: torch.Tensor,
    held: dict[str, str],
    cfg: ExportConfig,
) -> tuple[dict[str, Any], list[str]]:
    """Reload what was written and compare it with what Megatron holds.

    Returns the content of proof.json, and everything that does not hold.
    """
    written = {name: digest(tensor) for name, tensor in read_tensors(directory)}
    wrong = sorted(name for name in held.keys() | written.keys() if held.get(name) != written.get(name))
    failures = [f"tensors differ: {', '.join(wrong[:5])}"] if wrong else []
    loader = AutoModelForCausalLM if model.head == "lm" else AutoModelForSequenceClassification
    network, info = loader.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            failures.append(f"transformers reports {kind}: {sorted(map(str, info[kind]))[:5]}")
    theirs = hf_outputs(network, model.head, tokens)
    difference = float((theirs - outputs).abs().max())
    # In half precision the written weights are rounded, and so is the comparison.
    tolerance = cfg.logits_tolerance if cfg.dtype == "float32" and cfg.trainer.precision == "32" else 0.25
    if not difference <= tolerance:
        failures.append(f"outputs differ by {difference:.3g}, more than {tolerance:g}")
    agreement = float((theirs.argmax(-1) == outputs.argmax(-1)).float().mean()) if model.head == "lm" else 1.0
    proof = {
        "logits_max_abs_diff": difference,
        "logits_tolerance": tolerance,
        "cosine": float(
            torch.cosine_similarity(theirs.flatten().double(), outputs.flatten().double(), dim=0)
        ),
        "top1_agreement": agreement,
        "probes": {"sequences": PROBES, "length": PROBE_LENGTH, "seed": PROBE_SEED},
        "fingerprint": model.fingerprint(),
        "head": model.head,
        "dtype": cfg.dtype,
        "tensors": written,
    }
    return proof, failures


@torch.no_grad()
def hf_outputs(network: torch.nn.Module, head: str, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' logits [B, S, V], or the score at every token [B, S]."""
    network.eval()
    if head == "lm":
        return network(input_ids=tokens).logits.float()
    return network.score(network.model(input_ids=tokens).last_hidden_state)[..., 0].float()


def finish(partial: Path, out: Path, proof: dict[str, Any], tokeniser: Tokeniser) -> None:
    """Tokenizer, generation config and proof beside the weights; then the directory gets its name."""
    tokeniser.hf.save_pretrained(partial)
    config_path = partial / "config.json"
    ends = {"eos_token_id": tokeniser.eos_id, "pad_token_id": tokeniser.pad_id}
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | ends, indent=1) + "\n")
    (partial / "generation_config.json").write_text(json.dumps(ends, indent=1) + "\n")
    (partial / PROOF_FILE).write_text(json.dumps(proof, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def probe_tokens(vocab_size: int) -> torch.Tensor:
    """Fixed random sequences [PROBES, PROBE_LENGTH] over the whole vocabulary."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    return torch.randint(0, vocab_size, (PROBES, PROBE_LENGTH), generator=generator)


def read_tensors(directory: Path) -> Any:
    """(name, tensor) of every tensor in the safetensors files of a directory."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (safe_open is not a mapping)
                yield name, handle.get_tensor(name)


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    body = tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return hashlib.sha256(head + body).hexdigest()
