"""What each process of the memory test does: build a model, take one step, and count the bytes that are held."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core import parallel_state

from her_nemo.config.lora import Lora, expand
from her_nemo.megatron import forward, optimizer, parallel, qwen3

SHAPE = qwen3.Qwen3Shape(
    num_layers=4, hidden_size=48, ffn_hidden_size=80, num_attention_heads=4, num_query_groups=2, kv_channels=16,
    vocab_size=250, rotary_base=10000.0, max_position_embeddings=64,
)  # fmt: skip


def measure(args: dict) -> dict:
    """{case: bytes on this rank} of every case in args["cases"]."""
    return {case["name"]: _measure(case) for case in args["cases"]}


def _measure(case: dict) -> dict:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel.initialize(tensor=case.get("tensor", 1), pipeline=case.get("pipeline", 1), seed=1)
    shape = qwen3.Qwen3Shape(**{**vars(SHAPE), "tied": case.get("tied", True)})
    recompute = case.get("recompute")
    model = qwen3.build(
        shape,
        head=case.get("head", "lm"),
        dtype=case["precision"],
        sequence_parallel=case.get("sequence_parallel", False),
        distributed_optimizer=case.get("distributed", False),
        lora=Lora(expand(case["lora"]), rank=4, alpha=8.0) if case.get("lora") else None,
        recompute_granularity=recompute[0] if recompute else None,
        recompute_method=recompute[1] if recompute else None,
        recompute_num_layers=recompute[2] if recompute else None,
    )
    made = optimizer.optimizer(model, lr=1e-3)
    parameters = list(model.bare().parameters())
    weights = storage_bytes(parameters)
    gradients = storage_bytes(buffer.grad_data for buffer in model.chunks[0].buffers)
    activations = _backward(model, case["batch"], case["sequence"])
    optimizer.step(made, 1)
    inner = getattr(made, "optimizer", made)
    states = [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
    held = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    stepped = [p for group in inner.param_groups for p in group["params"]]
    main = [p for p in stepped if p.untyped_storage().data_ptr() not in held]
    return {
        "weights": weights,
        "gradients": gradients,
        "main_weights": storage_bytes(main),
        "moments": sum(value.numel() * value.element_size() for value in states if value.dim() > 0),
        "activations": activations,
        "stage": parallel.pipeline_rank(),
        "data_rank": parallel.data_rank(),
    }


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def _backward(model: qwen3.Model, batch: int, sequence: int) -> int:
    """One forward and backward; the bytes autograd kept between them, parameters and buffers left out."""
    module = model.bare()
    mine = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps addresses from being reused
    forwarding = True

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if forwarding and storage.data_ptr() not in mine and storage.nbytes():
            kept[storage.data_ptr()] = storage
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal forwarding
        forwarding = False  # what recomputation keeps while going backward is not kept between the passes
        return tensor

    def loss(said: forward.TokenOutputs, _: dict) -> tuple:
        found = said.values_BS if said.values_BS is not None else said.log_probs_BT
        return found.sum(), torch.tensor(found.numel()), {}

    tokens = torch.randint(0, SHAPE.vocab_size, (batch, sequence), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        forward.forward_backward(model, [{"tokens_BS": tokens}], loss)
    return sum(storage.nbytes() for storage in kept.values())
