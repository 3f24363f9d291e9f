"""LoRA (Hu et al. 2021, arXiv 2106.09685) as it is configured: which linear maps get an adapter, and of what size.

NeMo-Aligner's names of the maps, megatron-core's, and Hugging Face's. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

# NeMo-Aligner's target -> megatron-core's linear map, in the order of the layer.
TARGETS = {
    "attention_qkv": "linear_qkv",
    "attention_dense": "linear_proj",
    "mlp_fc1": "linear_fc1",
    "mlp_fc2": "linear_fc2",
}
GROUPS = {
    "attention": ("attention_qkv", "attention_dense"),
    "mlp": ("mlp_fc1", "mlp_fc2"),
    "all": tuple(TARGETS),
}
# megatron-core's linear map -> the Hugging Face modules that it holds, in the order of `qwen3_map`.
HF_MODULES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}


@dataclass(frozen=True)
class Lora:
    """The adapters of one model: y = W x + alpha / rank * B A x, with A [rank, in] and B [out, rank]."""

    targets: tuple[str, ...]
    """megatron-core's names, in the order of the layer."""
    rank: int
    alpha: float
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint says of its adapters."""
        return asdict(self) | {"targets": list(self.targets)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any] | None) -> Lora | None:
        """The reverse; None for a model without adapters."""
        return None if body is None else cls(**{**body, "targets": tuple(body["targets"])})

    def differences(self, other: Lora) -> list[str]:
        """What makes the two different functions or different tensors; dropout does neither."""
        mine, theirs = self.to_json(), other.to_json()
        keys = [key for key in ("targets", "rank", "alpha") if mine[key] != theirs[key]]
        return [f"its adapters' {key} is {theirs[key]}, the model configured has {mine[key]}" for key in keys]


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """NeMo-Aligner's target names -> megatron-core's, each once, in the order of the layer."""
    wanted = {target for name in names for target in GROUPS.get(name, (name,))}
    return tuple(ours for theirs, ours in TARGETS.items() if theirs in wanted)


def problem_of(held: Lora | None, wanted: Lora | None) -> str:
    """How the adapters of a checkpoint differ from those configured; "" if they do not."""
    if held is None or wanted is None:
        if held == wanted:
            return ""
        return "it has LoRA adapters, the model configured has none" if held else "it has no LoRA adapters"
    return "; ".join(wanted.differences(held))
