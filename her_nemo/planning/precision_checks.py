"""What FP8 needs of the GPU, of the recipe and of the sizes, and what of it a configuration lacks. No torch.

An FP8 matrix product takes operands whose sides are multiples of 16 (of 32 with mxfp8, whose blocks are 32 wide): both
sides of every rank's part of a matrix and, for the gradients of weights, the tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from her_nemo.config.errors import Problem
from her_nemo.config.schema import ExportConfig, ModelConfig, PpoConfig, RewardConfig, SftConfig

# Compute capability that Transformer Engine asks of a recipe, and the first GPUs that have it.
NEEDS: dict[str, tuple[tuple[int, int], str]] = {
    "delayed": ((8, 9), "Ada, Hopper or newer"),
    "tensorwise": ((8, 9), "Ada, Hopper or newer"),
    "blockwise": ((9, 0), "Hopper or newer (with CUDA 12.9 or newer)"),
    "mxfp8": ((10, 0), "Blackwell"),
}
# trainer.gpu -> compute capability and the name of the generation.
GENERATIONS: dict[str, tuple[tuple[int, int], str]] = {
    "a100_80gb": ((8, 0), "Ampere"),
    "h100_80gb": ((9, 0), "Hopper"),
    "h200_141gb": ((9, 0), "Hopper"),
}
# vLLM reads weights in blocks of this many rows and columns (Qwen3's and DeepSeek-V3's own FP8 files).
EXPORT_BLOCK = 128
_WITH_FP8 = ("fp8_e4m3", "fp8_hybrid", "fp8_params", "first_last_layers_bf16")


def multiple_of(recipe: str) -> int:
    """What every side of an FP8 matrix product is a multiple of."""
    return 32 if recipe == "mxfp8" else 16


def check(config: SftConfig | RewardConfig | PpoConfig, shape: Mapping[str, Any]) -> Iterator[Problem]:
    """Everything wrong with the precision keys; `shape`: the architecture keys known of the checkpoint."""
    model = config.model
    if not model.fp8:
        for key in _WITH_FP8:
            if getattr(model, key):
                hint = f"set model.fp8=true, or leave model.{key} out"
                yield Problem(f"model.{key}", "has an effect with model.fp8 only", hint=hint)
        return
    yield from _where(config)
    yield from _recipe(config)
    yield from _layers(model, shape)
    for name, size in misfits(model, shape):
        unit = multiple_of(model.fp8_recipe)
        text = f"{name} = {size} on each rank is not a multiple of {unit}, which FP8 matrix products need"
        hint = "use a smaller model.tensor_model_parallel_size, or leave model.fp8 out"
        yield Problem("model.fp8", text, hint=hint)
    yield from _tokens(model)


def _where(config: SftConfig | RewardConfig | PpoConfig) -> Iterator[Problem]:
    trainer, recipe = config.trainer, config.model.fp8_recipe
    if trainer.precision == "32":
        hint = "set trainer.precision=bf16-mixed (precision=fp8 sets both)"
        yield Problem("trainer.precision", "32, but FP8 works beside bf16: what is not FP8 is bf16", hint=hint)
    if trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and trainer.gpu is None):
        where = "trainer.accelerator=cpu" if trainer.accelerator == "cpu" else "cluster=local names no GPU"
        hint = "leave model.fp8 out, or choose a cluster (cluster=h100_1x8), or set trainer.accelerator=gpu trainer.gpu"
        yield Problem("model.fp8", f"FP8 needs a GPU with FP8 tensor cores; {where}", hint=hint)
    if trainer.gpu is None:
        return
    have, generation = GENERATIONS[trainer.gpu]
    needed, first = NEEDS[recipe]
    if have < NEEDS["delayed"][0]:
        text = f"trainer.gpu={trainer.gpu} is {generation}, which has no FP8 ({recipe} needs {first})"
        yield Problem("model.fp8", text, hint="use precision=bf16_mixed there, or a cluster of H100s")
    elif have < needed:
        text = f"{recipe} needs {first}; trainer.gpu={trainer.gpu} is {generation}"
        hint = "use model.fp8_recipe=delayed, tensorwise or blockwise"
        yield Problem("model.fp8_recipe", text, hint=hint)


def _recipe(config: SftConfig | RewardConfig | PpoConfig) -> Iterator[Problem]:
    model = config.model
    if model.transformer_engine is False:
        hint = "leave model.transformer_engine out, or model.fp8"
        yield Problem("model.transformer_engine", "false, but FP8 goes through Transformer Engine", hint=hint)
    if model.fp8_e4m3 and model.fp8_hybrid:
        text = "fp8_e4m3 and fp8_hybrid are both true: gradients are in e4m3 or in e5m2"
        yield Problem("model.fp8_e4m3", text, hint="set one of them to false")
    if model.fp8_params and model.fp8_recipe == "mxfp8":
        text = "mxfp8 cannot keep weights in FP8 without the overlapped gathering of parameters, which is not built"
        yield Problem("model.fp8_params", text, hint="leave model.fp8_params out, or use another recipe")
    critic = getattr(config, "critic", None)
    for key, optim in (("model.optim.name", model.optim), ("critic.optim.name", critic.optim if critic else None)):
        if model.fp8_params and optim is not None and optim.name != "distributed_fused_adam":
            text = f"{optim.name} steps the model's own weights; fp8_params needs the fp32 ones of the distributed one"
            yield Problem(key, text, hint=f"set {key}=distributed_fused_adam, or leave model.fp8_params out")


def _layers(model: ModelConfig, shape: Mapping[str, Any]) -> Iterator[Problem]:
    if not model.first_last_layers_bf16:
        return
    if model.fp8_recipe == "delayed":
        text = "delayed scaling keeps one history for the whole model and cannot leave layers out"
        hint = "use model.fp8_recipe=tensorwise (or blockwise)"
        yield Problem("model.first_last_layers_bf16", text, hint=hint)
    layers = shape.get("num_layers")
    stage = None if layers is None else int(layers) // model.pipeline_model_parallel_size
    for side, count in zip(("start", "end"), model.layers_in_bf16, strict=True):
        if stage is not None and count > stage:
            key = f"model.num_layers_at_{side}_in_bf16"
            text = f"{count} is more than the {stage} layers of a pipeline stage"
            yield Problem(key, text, hint=f"use {key}={stage} or less")


def misfits(model: ModelConfig, shape: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(name, size) of each side of a rank's matrices that FP8 cannot take; sizes that are not known are left out."""
    names = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    if any(name not in shape for name in names):
        return []
    hidden, ffn, heads, groups, width = (int(shape[name]) for name in names)
    tp, unit = model.tensor_model_parallel_size, multiple_of(model.fp8_recipe)
    sides = (
        ("hidden_size", hidden),
        ("ffn_hidden_size / TP", ffn // tp),
        ("attention width / TP", heads * width // tp),
        ("query, key and value width / TP", (heads + 2 * groups) * width // tp),
    )
    return [(name, size) for name, size in sides if size % unit]


def _tokens(model: ModelConfig) -> Iterator[Problem]:
    """Shorter rows are padded as they come; the longest must fit, or every one would grow beyond what was asked."""
    tokens = model.encoder_seq_length * model.micro_batch_size
    unit = multiple_of(model.fp8_recipe) * (model.tensor_model_parallel_size if model.sequence_parallel else 1)
    if tokens % unit:
        text = (
            f"encoder_seq_length {model.encoder_seq_length} x micro_batch_size {model.micro_batch_size} = {tokens} "
            f"tokens are not a multiple of {unit}, which FP8 matrix products need"
        )
        above = -(-model.encoder_seq_length // unit) * unit
        yield Problem("model.encoder_seq_length", text, hint=f"use model.encoder_seq_length={above}")


def export(config: ExportConfig, shape: Mapping[str, Any]) -> Iterator[Problem]:
    """vLLM reads merged matrices (q, k, v; gate, up) block by block: each must end at a block's end."""
    names = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    if config.dtype != "fp8" or any(name not in shape for name in names):
        return
    for name, size in export_misfits(*(int(shape[name]) for name in names)):
        text = f"fp8 is written in blocks of {EXPORT_BLOCK} x {EXPORT_BLOCK}, and {name} = {size} is no multiple of it"
        yield Problem("dtype", text, hint="use dtype=bfloat16")


def export_misfits(hidden: int, ffn: int, heads: int, groups: int, width: int) -> list[tuple[str, int]]:
    """(name, size) of each side of a matrix that blocks do not divide."""
    sides = (
        ("hidden_size", hidden),
        ("ffn_hidden_size", ffn),
        ("query width", heads * width),
        ("key width", groups * width),
    )
    return [(name, size) for name, size in sides if size % EXPORT_BLOCK]
