"""Where a model comes from: a Hugging Face directory, or one of our checkpoints. One answer for every stage.

A LoRA checkpoint holds adapters and says which base they belong to; it is taken as the two merged.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from her_nemo.config import lora as adapter_config
from her_nemo.config.errors import UserError
from her_nemo.config.lora import Lora
from her_nemo.megatron import qwen3, state, weights
from her_nemo.megatron.adapter_files import AdapterTensors, MegatronRows, MergedTensors, sampled_digest
from her_nemo.megatron.conversion import source_identity
from her_nemo.megatron.precision import from_config
from her_nemo.megatron.qwen3 import Model, Qwen3Shape
from her_nemo.megatron.qwen3_map import hf_shapes
from her_nemo.megatron.safetensors_files import HfTensors
from her_nemo.megatron.single_layer import LayerRows
from her_nemo.megatron.streaming import MegatronTensors, Tensors
from her_nemo.megatron.torch_dist import TorchDist
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
    lora: Lora | None = None  # the adapters a checkpoint holds
    base: ModelSource | None = None  # and what they belong to

    def load_into(self, model: Model) -> None:
        """Fill `model` (collective). A language model gives a scalar-headed one all but its head."""
        if self.lora is not None:
            merged = self.tensors()
            weights.load_tensors(model, merged)
            merged.close()
        elif self.is_hf:
            weights.load_hf(model, self.path)
        else:
            state.load(self.path / self.part, model)

    def adapters(self) -> AdapterTensors:
        """The adapters of a LoRA checkpoint."""
        assert self.lora is not None
        return AdapterTensors(self.path / self.part, self.shape, self.head, self.lora)

    def megatron_rows(self, adapter_dtype: torch.dtype = torch.float32) -> LayerRows:
        """A checkpoint's weights under megatron-core's names, read in rows. Adapters are rounded to `adapter_dtype`."""
        if self.lora is None:
            return TorchDist(self.path / self.part)
        assert self.base is not None
        return MegatronRows(self.base.tensors(), self.adapters(), self.shape, self.head, adapter_dtype)

    def tensors(self) -> Tensors | MergedTensors:
        """The weights under their Hugging Face names, read lazily in rows, checked for names and shapes."""
        if self.lora is not None:
            assert self.base is not None
            return MergedTensors(self.base.tensors(), self.adapters())
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


def digest(source: ModelSource) -> str:
    """What tells the weights of a source from others, wherever they lie (see `sampled_digest`)."""
    tensors = source.tensors()
    try:
        return sampled_digest(tensors, hf_shapes(source.shape, source.head))
    finally:
        tensors.close()


def locate(path: str | Path, part: str = "model", base: str | Path | None = None) -> ModelSource:
    """Find out what lies at `path`. `base`: where a LoRA checkpoint's base lies, if not where it lay in training.

    Raises:
        UserError: nothing there, or neither a Hugging Face directory nor a finished checkpoint, or a LoRA checkpoint
            whose base is not there or not the one it was trained on.
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
    found = ModelSource(
        manifest.directory, False, Qwen3Shape(**entry["shape"]), entry["head"], tokenizer, part
    )
    lora = Lora.from_json(entry.get("lora"))
    if lora is None:
        return found
    return replace(found, lora=lora, base=_base_of(manifest.directory, entry["base"], base))


def _base_of(checkpoint_dir: Path, recorded: dict[str, str], moved: str | Path | None) -> ModelSource:
    """The base of a LoRA checkpoint. UserError if it is not there, or another model."""
    place = Path(moved or recorded["path"])
    if not place.is_dir():
        raise UserError(
            f"{checkpoint_dir} holds LoRA adapters, and the model they belong to is no longer at {place}. Put it back, "
            "or export the checkpoint with base=DIR naming where it is now."
        )
    base = locate(place)
    if digest(base) != recorded["digest"]:
        raise UserError(f"{checkpoint_dir} holds LoRA adapters of another model than the one at {place}")
    return base


def is_hf(path: str | Path) -> bool:
    """True for a Hugging Face directory."""
    return (Path(path) / "config.json").is_file()


def describe(model: Model) -> dict[str, Any]:
    """The entry of a model in a checkpoint's manifest."""
    found = {"shape": asdict(model.shape), "head": model.head, "fingerprint": model.fingerprint()}
    return found if model.lora is None else {**found, "lora": model.lora.to_json(), "base": model.base}


def build(
    source: ModelSource,
    layout: Any,
    precision: str,
    *,
    head: str,
    trainable: bool,
    distributed_optimizer: bool = False,
    lora: Lora | None = None,
    adapters: ModelSource | None = None,
) -> Model:
    """A Megatron model of the source's shape, cut as `layout` (the config's `model` section) says, and filled.

    With `lora` the source becomes the frozen base of new adapters, or of those of the checkpoint `adapters`.
    """
    model = qwen3.build(
        source.shape,
        head=head,
        dtype=from_config(precision, layout),
        sequence_parallel=layout.sequence_parallel,
        trainable=trainable,
        lora=lora,
        distributed_optimizer=distributed_optimizer,
        make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by,
        recompute_granularity=getattr(layout, "activations_checkpoint_granularity", None),
        recompute_method=getattr(layout, "activations_checkpoint_method", None),
        recompute_num_layers=getattr(layout, "activations_checkpoint_num_layers", None),
    )
    source.load_into(model)
    if lora is not None:
        model.base = {"path": str(source.path.resolve()), "digest": digest(source)}
        if adapters is not None:
            _check_adapters(adapters, lora, model.base)
            state.load(adapters.path / adapters.part, model)
    return model


def _check_adapters(adapters: ModelSource, lora: Lora, base: dict[str, str]) -> None:
    """UserError if the adapters are not those configured, or not of this base."""
    differing = adapter_config.problem_of(adapters.lora, lora)
    if not differing and adapters.base is not None and digest(adapters.base) != base["digest"]:
        differing = f"they belong to {adapters.base.path}, not to {base['path']}"
    if differing:
        raise UserError(f"model.peft.restore_from_path={adapters.path}: {differing}")


def _hf_head(directory: Path) -> str:
    architectures = json.loads((directory / "config.json").read_text()).get("architectures") or []
    return "scalar" if "Qwen3ForSequenceClassification" in architectures else "lm"
