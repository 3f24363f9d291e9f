"""Qwen3 as a megatron-core GPTModel: its shape, its configuration, and the built model of this rank."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from her_nemo.config.architecture import Sizes
from her_nemo.config.errors import UserError
from her_nemo.config.lora import Lora
from her_nemo.megatron import adapters, parallel, platform
from her_nemo.megatron.attention import layer_spec
from her_nemo.megatron.heads import ScalarHead
from her_nemo.megatron.precision import Precision, check_device, forget, precision

Head = Literal["lm", "scalar"]


@dataclass(frozen=True)
class Qwen3Shape(Sizes):
    """What defines a dense Qwen3."""

    rotary_base: float = 1_000_000.0
    layernorm_epsilon: float = 1e-6
    tied: bool = True
    max_position_embeddings: int = 40960
    init_method_std: float = 0.02

    @classmethod
    def from_hf_dir(cls, path: str | Path) -> Qwen3Shape:
        """Read `config.json` of a Hugging Face directory. UserError if it is not a plain dense Qwen3."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise UserError(f"{file} does not exist: {path} is not a Hugging Face model directory")
        raw = json.loads(file.read_text())
        if raw.get("model_type") != "qwen3":
            raise UserError(f"{file}: model_type is {raw.get('model_type')!r}; only dense 'qwen3' is supported")
        if raw.get("quantization_config"):
            raise UserError(f"{file}: its weights are quantised; start from the same model in bf16")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        for key, value, wanted in (
            ("rope_type", kind, "default"),
            ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
            ("attention_bias", raw.get("attention_bias", False), False),
            ("use_sliding_window", raw.get("use_sliding_window", False), False),
        ):
            if value != wanted:
                raise UserError(f"{file}: {key} is {value!r}; only {wanted!r} is supported")
        try:
            heads = raw["num_attention_heads"]
            return cls(
                num_layers=raw["num_hidden_layers"],
                hidden_size=raw["hidden_size"],
                ffn_hidden_size=raw["intermediate_size"],
                num_attention_heads=heads,
                num_query_groups=raw.get("num_key_value_heads", heads),
                kv_channels=raw.get("head_dim") or raw["hidden_size"] // heads,
                vocab_size=raw["vocab_size"],
                rotary_base=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
                layernorm_epsilon=raw.get("rms_norm_eps", 1e-6),
                tied=bool(raw.get("tie_word_embeddings", False)),
                max_position_embeddings=raw.get("max_position_embeddings", 32768),
                init_method_std=raw.get("initializer_range", 0.02),
            )
        except KeyError as error:
            raise UserError(f"{file}: key {error.args[0]!r} is missing") from None

    @classmethod
    def from_config(cls, model: Any) -> Qwen3Shape:
        """From `config.schema.ModelConfig` (the keys of the same names)."""
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            kv_channels=model.kv_channels,
            vocab_size=model.vocab_size,
            rotary_base=float(model.rotary_base),
            layernorm_epsilon=model.layernorm_epsilon,
            tied=model.share_embeddings_and_output_weights,
            max_position_embeddings=model.max_position_embeddings,
            init_method_std=model.init_method_std,
        )

    def to_hf_config(self, *, head: Head = "lm", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The content of `config.json` for this shape, readable by transformers 4 and 5 and by vLLM."""
        config: dict[str, Any] = {
            "architectures": ["Qwen3ForCausalLM" if head == "lm" else "Qwen3ForSequenceClassification"],
            "model_type": "qwen3",
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.kv_channels,
            "vocab_size": self.vocab_size,
            "rope_theta": self.rotary_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rotary_base},
            "rms_norm_eps": self.layernorm_epsilon,
            "tie_word_embeddings": self.tied if head == "lm" else False,
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.init_method_std,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "use_cache": True,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        if head == "scalar":
            config |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        return config

    def fingerprint(self, head: Head = "lm") -> str:
        """Sixteen hex digits that agree exactly when two checkpoints hold tensors of the same names and shapes."""
        identity = asdict(self) | {"head": head}
        for free in ("max_position_embeddings", "init_method_std"):
            identity.pop(free)
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Model:
    """The part of a model that this rank holds."""

    chunks: list[torch.nn.Module]
    """One module per virtual stage (one, so far): DistributedDataParallel if trainable, else the bare GPTModel."""
    shape: Qwen3Shape
    head: Head
    config: TransformerConfig
    precision: Precision
    padded_vocab_size: int
    trainable: bool
    lora: Lora | None = None
    """The adapters; then nothing else is trained."""
    base: dict[str, str] | None = None
    """With adapters: which model they belong to, as a checkpoint of them says it (training/source.py)."""
    adapters_off: bool = False
    """The tensors are another model's, whose adapters take no part here."""

    def bare(self) -> GPTModel:
        """The GPTModel of the (only) chunk, without its data-parallel wrapper."""
        chunk = self.chunks[0]
        return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk

    @property
    def distributed_optimizer(self) -> bool:
        """True if gradients are reduce-scattered for the distributed optimizer."""
        return self.trainable and self.chunks[0].ddp_config.use_distributed_optimizer

    def fingerprint(self) -> str:
        """Identity of shape and head, independent of the parallel layout."""
        return self.shape.fingerprint(self.head)


def check_layout(shape: Qwen3Shape, tensor: int, pipeline: int) -> None:
    """UserError naming every size that the parallel layout does not divide."""
    problems = [
        f"tensor_model_parallel_size={tensor} does not divide {name}={size}"
        for name, size in (
            ("num_attention_heads", shape.num_attention_heads),
            ("ffn_hidden_size", shape.ffn_hidden_size),
        )
        if size % tensor
    ]
    # With fewer groups than ranks megatron-core cuts the rows of q, k and v evenly, gathers what they give, and
    # every rank of a group computes with the group's key and value.
    groups, qkv = shape.num_query_groups, shape.num_attention_heads + 2 * shape.num_query_groups
    if groups % tensor and (tensor % groups or qkv * shape.kv_channels % tensor):
        problems.append(
            f"tensor_model_parallel_size={tensor} neither divides num_query_groups={groups} nor is a multiple of it "
            "that divides the rows of q, k and v"
        )
    if shape.num_layers % pipeline:
        problems.append(f"pipeline_model_parallel_size={pipeline} does not divide num_layers={shape.num_layers}")
    if problems:
        raise UserError("; ".join(problems))


def transformer_config(
    shape: Qwen3Shape,
    *,
    settings: Precision,
    sequence_parallel: bool = False,
    recompute_granularity: str | None = None,
    recompute_method: str | None = None,
    recompute_num_layers: int | None = None,
    initialise: bool = True,
) -> TransformerConfig:
    """megatron-core's configuration of this shape at the current layout. Fusions only where their kernels exist."""
    tensor, pipeline = parallel.tensor_size(), parallel.pipeline_size()
    check_layout(shape, tensor, pipeline)
    fused = settings.fused
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        layernorm_epsilon=shape.layernorm_epsilon,
        init_method_std=shape.init_method_std,
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=sequence_parallel and tensor > 1,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=initialise,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=pipeline > 1,
        bias_activation_fusion=fused,
        bias_dropout_fusion=False,
        apply_rope_fusion=fused,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=fused,
        recompute_granularity=recompute_granularity,
        recompute_method=recompute_method,
        recompute_num_layers=recompute_num_layers,
        **settings.transformer_fields(),
    )


def build(
    shape: Qwen3Shape,
    *,
    head: Head = "lm",
    dtype: str | torch.dtype | Precision = "32",
    sequence_parallel: bool = False,
    trainable: bool = True,
    lora: Lora | None = None,
    distributed_optimizer: bool = False,
    make_vocab_size_divisible_by: int = 128,
    recompute_granularity: str | None = None,
    recompute_method: str | None = None,
    recompute_num_layers: int | None = None,
    initialise: bool = True,
) -> Model:
    """Build this rank's part of the model, randomly initialised (or not at all), on `platform.device()`.

    `parallel.initialize` must have run. dtype is a `trainer.precision`, a parameter dtype or a whole
    Precision. The vocabulary is
    padded to a multiple of `make_vocab_size_divisible_by * tensor size`; padded entries never get probability.
    A model that is not trainable has no gradient buffers and requires no gradients; of one with adapters (`lora`)
    only these do.
    Raises UserError if the layout does not divide the shape.
    """
    settings = precision(dtype)
    if torch.cuda.is_available():
        check_device(settings, torch.cuda.get_device_capability())
    config = transformer_config(
        shape,
        settings=settings,
        sequence_parallel=sequence_parallel,
        recompute_granularity=recompute_granularity,
        recompute_method=recompute_method,
        recompute_num_layers=recompute_num_layers,
        initialise=initialise,
    )
    multiple = make_vocab_size_divisible_by * parallel.tensor_size()
    padded = -(-shape.vocab_size // multiple) * multiple
    module = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(config, fused=settings.fused),
        vocab_size=padded,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel.is_first_stage(),
        post_process=parallel.is_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied and head == "lm",
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
    )
    if head == "scalar" and parallel.is_last_stage():
        module.output_layer = ScalarHead(config)
    if lora is not None:
        adapters.attach(module, lora, config)
    if settings.fp8 is None or not settings.fp8.params:
        module.to(device=platform.device(), dtype=settings.params_dtype)
    chunk: torch.nn.Module = module
    if trainable:
        chunk = _data_parallel(module, config, settings, distributed_optimizer)
        config.finalize_model_grads_func = finalize_model_grads
    else:
        module.requires_grad_(False)
        module.eval()
        for parameter in module.parameters():
            forget(parameter)
    return Model([chunk], shape, head, config, settings, padded, trainable, lora)


def _data_parallel(
    module: GPTModel, config: TransformerConfig, settings: Precision, distributed_optimizer: bool
) -> DistributedDataParallel:
    overlap = torch.cuda.is_available() and parallel.data_size() > 1
    chunk = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=distributed_optimizer,
            overlap_grad_reduce=overlap,
            **settings.data_parallel_fields(),
        ),
        module,
    )
    if overlap:
        config.no_sync_func = chunk.no_sync
    # Replicas start from the same seed; this makes it certain.
    chunk.broadcast_params()
    return chunk
