"""LoRA adapters in a megatron-core model (Hu et al. 2021, arXiv 2106.09685): the modules, and what they add to weights.

An adapter stands beside its linear map (`self_attention.linear_qkv_lora` beside `linear_qkv`), so that names, weights
and code of the base stay what they are; a hook adds what the adapter says to what the map says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)

from her_nemo.config.lora import Lora
from her_nemo.megatron import parallel, platform
from her_nemo.megatron.precision import plain

if TYPE_CHECKING:
    from her_nemo.megatron.qwen3 import Model

SUFFIX = "_lora"
A, B = "lora_a", "lora_b"
# Where a target lies in a layer, and which side of it tensor parallelism cuts.
OWNERS = {
    "linear_qkv": "self_attention", "linear_proj": "self_attention", "linear_fc1": "mlp", "linear_fc2": "mlp"
}  # fmt: skip
COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")
_SEED = 15_485_863


class Adapter(MegatronModule):
    """scale * B A x for one linear map W [out, in], with A [rank, in] and B [out, rank], cut as W is cut.

    Beside a column-parallel map A is whole on every tensor-parallel rank and B has W's rows; beside a row-parallel
    one A has W's columns and B is whole. What is exchanged is `rank` wide. Under sequence parallelism the whole matrix
    sees a part of the sequence: it is marked, and finalize_model_grads sums its gradient over the ranks.
    """

    def __init__(self, config: TransformerConfig, lora: Lora, target: str, layer: int, linear: torch.nn.Module) -> None:
        super().__init__(config)
        self.target, self.layer = target, layer
        self.rank, self.scale, self.dropout = lora.rank, lora.scale, lora.dropout
        self.column = target in COLUMN_PARALLEL
        self.sequence_parallel = config.sequence_parallel
        self.enabled = True
        out_features, in_features = linear.weight.shape
        made = {"dtype": config.params_dtype, "device": platform.device()}
        self.lora_a = torch.nn.Parameter(torch.empty(lora.rank, in_features, **made))
        self.lora_b = torch.nn.Parameter(torch.zeros(out_features, lora.rank, **made))
        cut, whole = (self.lora_b, self.lora_a) if self.column else (self.lora_a, self.lora_b)
        # Marked as cut, a parameter counts on every rank in the gradient norm; unmarked, on the first only.
        set_tensor_model_parallel_attributes(cut, True, 0 if self.column else 1, 1)
        whole.sequence_parallel = config.sequence_parallel
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """B to zero; A by Xavier's normal rule on the whole matrix, from its own generator: equal at every layout."""
        parts = 1 if self.column else parallel.tensor_size()
        width = self.lora_a.shape[1]
        generator = torch.Generator().manual_seed(_SEED * (self.layer + 1) + list(OWNERS).index(self.target))
        whole = torch.randn(self.rank, width * parts, generator=generator)
        whole *= math.sqrt(2.0 / (self.rank + width * parts))
        first = 0 if self.column else parallel.tensor_rank() * width
        self.lora_a.copy_(whole[:, first : first + width])
        self.lora_b.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [S, B, in], as the linear map gets it -> [S, B, out], to be added to what the map gives."""
        if self.training and self.dropout > 0.0:
            x = self._drop(x)
        low = F.linear(x, self.lora_a)
        if self.column and self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True)
        elif self.column:
            low = copy_to_tensor_model_parallel_region(low)
        elif self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low)
        else:
            low = reduce_from_tensor_model_parallel_region(low)
        if self.scale != 1.0:
            low = low * self.scale
        return F.linear(low, self.lora_b)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        if self.column and not self.sequence_parallel:
            # Every tensor-parallel rank has this input whole and has to drop the same of it.
            return F.dropout(x, self.dropout)
        with get_cuda_rng_tracker().fork():
            return F.dropout(x, self.dropout)

    @torch.no_grad()
    def addition(self) -> torch.Tensor:
        """What merging adds to this rank's part of W: scale * B A, fp32 [out, in]."""
        return (self.lora_b.float() @ self.lora_a.float()) * self.scale

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The two matrices as megatron-core's sharded tensors; gate and up apart, as it stores them."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        found = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {B: 0} if self.column else {A: 1},
            sharded_offsets,
            tp_group=parallel.tensor_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.target == "linear_fc1":
            found[prefix + B] = apply_swiglu_sharded_factory(found[prefix + B], sharded_offsets)
        return found


def is_adapter(name: str) -> bool:
    """True for a parameter's name, or a checkpoint's key, that is an adapter's."""
    return name.rpartition(".")[0].endswith(SUFFIX)


def attach(module: torch.nn.Module, lora: Lora, config: TransformerConfig) -> None:
    """Put adapters beside the targets of every layer of a GPTModel, and freeze everything else."""
    module.requires_grad_(False)
    for layer in module.decoder.layers:
        for target in lora.targets:
            owner = getattr(layer, OWNERS[target])
            linear = getattr(owner, target)
            adapter = Adapter(config, lora, target, layer.layer_number - 1, linear)
            owner.add_module(target + SUFFIX, adapter)
            linear.register_forward_hook(partial(_add, adapter))
    if config.recompute_granularity == "full" and module.pre_process:
        # A recomputed layer has gradients only if its input asks for them, and a frozen embedding's output does not.
        module.embedding.register_forward_hook(_ask_for_gradients)


def _add(adapter: Adapter, linear: torch.nn.Module, inputs: tuple, output: tuple) -> tuple | None:
    if not adapter.enabled:
        return None
    x = inputs[0]
    norm = getattr(linear, "layer_norm_weight", None)
    if norm is not None:
        # Transformer Engine normalises inside the linear map; the adapter takes the normalised input too.
        x = F.rms_norm(x, norm.shape, norm, linear.eps)
    return output[0] + adapter(x), *output[1:]


def _ask_for_gradients(_: torch.nn.Module, __: tuple, output: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def adapters_of(model: Model) -> dict[str, Adapter]:
    """Name of each adapted weight (as in `named_parameters` of the bare module) -> its adapter."""
    return {
        name.removesuffix(SUFFIX) + ".weight": module
        for name, module in model.bare().named_modules()
        if isinstance(module, Adapter)
    }


def without(model: Model) -> Model:
    """The same model, on the same tensors, with its adapters off and not trainable: the base."""
    return replace(model, trainable=False, adapters_off=True)


@contextmanager
def running(model: Model, *, learning: bool) -> Iterator[None]:
    """Adapters on or off as the model says, with dropout only where it learns."""
    if model.lora is None:
        yield
        return
    found = list(adapters_of(model).values())
    before = [(adapter.enabled, adapter.training) for adapter in found]
    for adapter in found:
        adapter.enabled = not model.adapters_off
        adapter.train(learning)
    try:
        yield
    finally:
        for adapter, (enabled, training) in zip(found, before, strict=True):
            adapter.enabled = enabled
            adapter.train(training)


class Merged:
    """This rank's parameters of the base by name, each with what its adapter adds (in fp32, then rounded once)."""

    def __init__(self, model: Model) -> None:
        self._parameters = dict(model.bare().named_parameters())
        self._adapters = {} if model.adapters_off else adapters_of(model)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = plain(self._parameters[name])
        if name not in self._adapters:
            return tensor
        return (tensor.float() + self._adapters[name].addition()).to(tensor.dtype)
