"""The shape of a model, in our configuration's names, read from what lies beside its weights. JSON only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from her_nemo.config.errors import UserError

Shape = dict[str, int | float | bool]


@dataclass(frozen=True)
class Sizes:
    """How many, how wide: what any dense model with grouped-query attention has. The vocabulary without padding."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int


# transformers' Qwen3Config -> model.*; the names of RoPE's theta and of defaults are handled below.
FROM_HF = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "layernorm_epsilon",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "init_method_std",
}
# Keys transformers may leave out of config.json, with Qwen3Config's defaults.
HF_DEFAULTS: Shape = {
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
}


def architecture_from_hf(path: str | Path) -> Shape:
    """The architecture of a Hugging Face directory, from its config.json.

    Raises UserError when the file is missing or unreadable, is not a dense Qwen3, or asks for something the
    Megatron model here does not do (attention biases, sliding windows, scaled RoPE).
    """
    file = Path(path) / "config.json"
    body = _read_json(file)
    if body.get("model_type") != "qwen3":
        raise UserError(
            f"{file}: model_type is {body.get('model_type')!r}; her_nemo reads dense Qwen3 ('qwen3')"
        )
    rope = body.get("rope_parameters") or body.get("rope_scaling") or {}
    unsupported = [key for key in ("attention_bias", "use_sliding_window") if body.get(key)]
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        unsupported.append(f"rope_type {rope.get('rope_type', rope.get('type'))!r}")
    if unsupported:
        raise UserError(f"{file}: not supported: {', '.join(unsupported)}")
    shape: Shape = {}
    missing = []
    for theirs, ours in FROM_HF.items():
        value = body.get(theirs)
        value = HF_DEFAULTS.get(theirs) if value is None else value
        if value is None:
            missing.append(theirs)
        else:
            shape[ours] = value
    theta = rope.get("rope_theta", body.get("rope_theta"))
    if theta is None:
        missing.append("rope_theta")
    if missing:
        raise UserError(f"{file}: missing {', '.join(missing)}")
    return shape | {"rotary_base": float(theta)}


def architecture_from_megatron(path: str | Path) -> Shape:
    """The architecture of a Megatron checkpoint (or of a run directory's latest), from its manifest.json."""
    file = megatron_manifest(path)
    if file is None:
        raise UserError(f"{path}: no finished checkpoint here (no manifest.json)")
    models = _read_json(file).get("models") or {}
    if not models:
        raise UserError(f"{file}: names no model; the checkpoint was not written by her_nemo")
    shape = dict((models.get("model") or next(iter(models.values())))["shape"])
    if "tied" in shape:
        shape["share_embeddings_and_output_weights"] = shape.pop("tied")
    return shape


def megatron_manifest(path: str | Path) -> Path | None:
    """manifest.json of a checkpoint directory or of the newest checkpoint of a run directory, or None."""
    folder = Path(path)
    pointer = folder / "checkpoints" / "latest"
    if pointer.is_file():
        folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    file = folder / "manifest.json"
    return file if file.is_file() else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    if not isinstance(body, dict):
        raise UserError(f"{file}: not a JSON object")
    return body
