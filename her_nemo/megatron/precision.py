"""What `trainer.precision` and `model.fp8*` mean: dtypes, which layers, and the switches of megatron-core's configs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

from her_nemo.config.errors import UserError
from her_nemo.config.precision import Fp8Keys
from her_nemo.megatron import platform
from her_nemo.planning.precision_checks import NEEDS, multiple_of


@dataclass(frozen=True)
class Fp8:
    """FP8 through Transformer Engine; names and values are megatron-core's."""

    format: Literal["e4m3", "hybrid"]
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
    margin: int = 0
    amax_history_len: int = 1024
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    params: bool = False
    """Keep the layers' matrices in FP8 alone."""
    bf16_layers: tuple[int, int] = (0, 0)
    """Layers that stay in bf16, at the start and at the end."""


@dataclass(frozen=True)
class Precision:
    """Dtypes of one precision setting. The optimizer always steps fp32 main parameters with fp32 states."""

    name: str
    params_dtype: torch.dtype
    grad_reduce_in_fp32: bool
    fp8: Fp8 | None = None
    transformer_engine: bool | None = None
    """True and False force the layers; None takes Transformer Engine's where it runs and fp32 is not asked for."""

    @property
    def bf16(self) -> bool:
        """True if parameters and activations are bfloat16."""
        return self.params_dtype is torch.bfloat16

    @property
    def fused(self) -> bool:
        """True if the layers are Transformer Engine's. UserError if they must be and cannot."""
        needed = self.fp8 is not None or self.transformer_engine is True
        if needed:
            platform.require_transformer_engine("model.fp8" if self.fp8 else "model.transformer_engine=true")
        # Its matrix products are TF32 when asked for fp32: ten bits of mantissa, not what "32" promises.
        return needed or (self.transformer_engine is None and self.bf16 and platform.has_transformer_engine())

    def multiple(self, micro_batch: int) -> int:
        """What the length of a micro-batch of so many rows is padded to a multiple of."""
        if self.fp8 is None:
            return 1
        unit = multiple_of(self.fp8.recipe)
        while unit > 1 and micro_batch % 2 == 0:
            unit, micro_batch = unit // 2, micro_batch // 2
        return unit

    # ------------------------------------------------------------ megatron-core's configurations

    def transformer_fields(self) -> dict[str, Any]:
        """Fields of TransformerConfig."""
        fields: dict[str, Any] = {
            "params_dtype": self.params_dtype, "pipeline_dtype": self.params_dtype, "bf16": self.bf16,
        }  # fmt: skip
        if self.fp8 is not None:
            start, end = self.fp8.bf16_layers
            fields |= {
                "fp8": self.fp8.format,
                "fp8_recipe": self.fp8.recipe,
                "fp8_margin": self.fp8.margin,
                "fp8_amax_history_len": self.fp8.amax_history_len,
                "fp8_amax_compute_algo": self.fp8.amax_compute_algo,
                "fp8_param": self.fp8.params,
                "first_last_layers_bf16": bool(start or end),
                "num_layers_at_start_in_bf16": start,
                "num_layers_at_end_in_bf16": end,
            }
        return fields

    def data_parallel_fields(self) -> dict[str, Any]:
        """Fields of DistributedDataParallelConfig."""
        fields: dict[str, Any] = {"grad_reduce_in_fp32": self.grad_reduce_in_fp32}
        if self.fp8 is not None:
            fields["fp8_param_gather"] = self.fp8.params
        return fields

    def optimizer_fields(self) -> dict[str, Any]:
        """Fields of OptimizerConfig."""
        fields: dict[str, Any] = {"bf16": self.bf16, "params_dtype": self.params_dtype}
        if self.fp8 is not None:
            fields["fp8_recipe"] = self.fp8.recipe
        return fields


_TABLE = {
    "32": Precision("32", torch.float32, grad_reduce_in_fp32=True),
    # bf16 compute, fp32 main parameters, gradients accumulated and reduced in fp32.
    "bf16-mixed": Precision("bf16-mixed", torch.bfloat16, grad_reduce_in_fp32=True),
    # The same, with gradients accumulated and reduced in bf16: less memory and traffic, less exact.
    "bf16": Precision("bf16", torch.bfloat16, grad_reduce_in_fp32=False),
}


def precision(name: str | int | torch.dtype | Precision) -> Precision:
    """The Precision for `trainer.precision` ("32", "bf16", "bf16-mixed") or for a parameter dtype."""
    if isinstance(name, Precision):
        return name
    if name is torch.float32:
        name = "32"
    elif name is torch.bfloat16:
        name = "bf16-mixed"
    found = _TABLE.get(str(name))
    if found is None:
        raise UserError(f"trainer.precision={name!r} is not one of {', '.join(_TABLE)}")
    return found


def from_config(name: str, keys: Any) -> Precision:
    """The Precision of `trainer.precision` and of the keys of `model`, where it has them (conversions have not)."""
    found = precision(name)
    return _with_keys(found, keys) if isinstance(keys, Fp8Keys) else found


def _with_keys(found: Precision, keys: Fp8Keys) -> Precision:
    found = replace(found, transformer_engine=keys.transformer_engine)
    if not keys.fp8:
        return found
    if not found.bf16:
        raise UserError(f"model.fp8 works beside bf16: set trainer.precision=bf16-mixed, not {found.name}")
    fp8 = Fp8(
        keys.fp8_format,
        keys.fp8_recipe,
        margin=keys.fp8_margin,
        amax_history_len=keys.fp8_amax_history_len,
        amax_compute_algo=keys.fp8_amax_compute_algo,
        params=keys.fp8_params,
        bf16_layers=keys.layers_in_bf16,
    )
    return replace(found, fp8=fp8)


def check_device(settings: Precision, capability: tuple[int, int]) -> None:
    """UserError if a GPU of this compute capability cannot run the recipe."""
    if settings.fp8 is None:
        return
    needed, first = NEEDS[settings.fp8.recipe]
    if capability < needed:
        have = ".".join(map(str, capability))
        raise UserError(
            f"model.fp8_recipe={settings.fp8.recipe} needs {first}; this GPU has compute capability {have}. "
            "Use another recipe (delayed and tensorwise need 8.9, blockwise 9.0, mxfp8 10.0), or leave model.fp8 out."
        )


# ---------------------------------------------------------------- weights kept in FP8


def plain(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter as a tensor of its nominal dtype: dequantised by Transformer Engine if it is kept in FP8."""
    found = parameter.detach()
    return dequantize_fp8_tensor(found) if is_float8tensor(found) else found


@torch.no_grad()
def fill(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Set a parameter. One kept in FP8 also remembers the values unrounded, for the optimizer to start from.

    Transformer Engine hands the optimizer the values a parameter was *initialised* with; left alone, training would
    start from random main weights whatever was loaded.
    """
    parameter.copy_(values.to(parameter.dtype))
    remember(parameter, values)


def forget(parameter: torch.nn.Parameter) -> None:
    """Drop those values of a parameter that no optimizer will step: they are a copy of the weight in host memory."""
    if getattr(parameter, "_high_precision_init_val", None) is not None:
        parameter.clear_high_precision_init_val()


def remember(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Replace the values that Transformer Engine kept of an FP8 parameter's initialisation, if it kept any."""
    if getattr(parameter, "_high_precision_init_val", None) is not None:
        parameter._high_precision_init_val = values.detach().to("cpu", parameter.dtype, copy=True)
