"""Where a model comes from: a Hugging Face directory, or one of our checkpoints. One answer for every stage."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.megatron import qwen3, state, weights
from her_nemo.megatron.conversion import source_identity
from her_nemo.megatron.precision import from_config
from her_nemo.megatron.qwen3 import Model, Qwen3Shape
from her_nemo.megatron.safetensors_files import HfTensors
from her_nemo.megatron.streaming import MegatronTensors, Tensors
from her_nemo.training import checkpoint


@dataclass(frozen=True)
class ModelSource:
    """A place that holds weights, what shape they have, and the tokenizer that goes with them."""

    path: Path
    is_hf: bool
    shape: Qwen3Shape
    head: str  # "lm" | "scalar"
    tokenizer: Path | None
    part: str = "model"  # which model of a checkpoint

    def load_into(self, model: Model) -> None:
        """Fill `model` (collective). A language model gives a scalar-headed one all but its head."""
        if self.is_hf:
            weights.load_hf(model, self.path)
        else:
            state.load(self.path / self.part, model)

    def tensors(self) -> Tensors:
        """The weights under their Hugging Face names, read lazily in rows, checked for names and shapes."""
        if not self.is_hf:
            return MegatronTensors(self.path / self.part, self.shape, self.head)
        held = HfTensors(self.path)
        weights.check_hf(held, self.shape, self.head)
        return held

    def identity(self) -> dict[str, Any]:
        """What tells this source from another, or from itself changed since."""
        if self.is_hf:
            return source_identity(self.path)
        manifest = (self.path / checkpoint.MANIFEST).read_bytes()
        return {"manifest": hashlib.sha256(manifest).hexdigest(), "part": self.part}


def locate(path: str | Path, part: str = "model") -> ModelSource:
    """Find out what lies at `path`.

    Raises:
        UserError: nothing there, or neither a Hugging Face directory nor a finished checkpoint.
    """
    place = Path(path)
    if not place.is_dir():
        raise UserError(
            f"{place}: no such directory. Give a Hugging Face directory or a Megatron checkpoint."
        )
    if is_hf(place):
        tokenizer = place if (place / "tokenizer.json").is_file() else None
        return ModelSource(place, True, Qwen3Shape.from_hf_dir(place), _hf_head(place), tokenizer)
    manifest = checkpoint.read(place)
    if part not in manifest.models:
        raise UserError(f"{manifest.directory}: holds {', '.join(manifest.models)}, not {part!r}.")
    entry = manifest.models[part]
    tokenizer = manifest.tokenizer if manifest.tokenizer.is_dir() else None
    return ModelSource(
        manifest.directory, False, Qwen3Shape(**entry["shape"]), entry["head"], tokenizer, part
    )


def is_hf(path: str | Path) -> bool:
    """True for a Hugging Face directory."""
    return (Path(path) / "config.json").is_file()


def describe(model: Model) -> dict[str, Any]:
    """The entry of a model in a checkpoint's manifest."""
    return {"shape": asdict(model.shape), "head": model.head, "fingerprint": model.fingerprint()}


def build(
    source: ModelSource,
    layout: Any,
    precision: str,
    *,
    head: str,
    trainable: bool,
    distributed_optimizer: bool = False,
) -> Model:
    """A Megatron model of the source's shape, cut as `layout` (the config's `model` section) says, and filled."""
    model = qwen3.build(
        source.shape,
        head=head,
        dtype=from_config(precision, layout),
        sequence_parallel=layout.sequence_parallel,
        trainable=trainable,
        distributed_optimizer=distributed_optimizer,
        make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by,
        recompute_granularity=getattr(layout, "activations_checkpoint_granularity", None),
        recompute_method=getattr(layout, "activations_checkpoint_method", None),
        recompute_num_layers=getattr(layout, "activations_checkpoint_num_layers", None),
    )
    source.load_into(model)
    return model


def _hf_head(directory: Path) -> str:
    architectures = json.loads((directory / "config.json").read_text()).get("architectures") or []
    return "scalar" if "Qwen3ForSequenceClassification" in architectures else "lm"
