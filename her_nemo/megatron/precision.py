"""What `trainer.precision` means: dtype of parameters, of gradients, and the switches of megatron-core's configs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from her_nemo.config.errors import UserError


@dataclass(frozen=True)
class Precision:
    """Dtypes of one precision setting. The optimizer always steps fp32 main parameters with fp32 states."""

    name: str
    params_dtype: torch.dtype
    grad_reduce_in_fp32: bool

    @property
    def bf16(self) -> bool:
        """True if parameters and activations are bfloat16."""
        return self.params_dtype is torch.bfloat16


_TABLE = {
    "32": Precision("32", torch.float32, grad_reduce_in_fp32=True),
    # bf16 compute, fp32 main parameters, gradients accumulated and reduced in fp32.
    "bf16-mixed": Precision("bf16-mixed", torch.bfloat16, grad_reduce_in_fp32=True),
    # The same, with gradients accumulated and reduced in bf16: less memory and traffic, less exact.
    "bf16": Precision("bf16", torch.bfloat16, grad_reduce_in_fp32=False),
}


def precision(name: str | int | torch.dtype) -> Precision:
    """The Precision for `trainer.precision` ("32", "bf16", "bf16-mixed") or for a parameter dtype."""
    if name is torch.float32:
        name = "32"
    elif name is torch.bfloat16:
        name = "bf16-mixed"
    found = _TABLE.get(str(name))
    if found is None:
        raise UserError(f"trainer.precision={name!r} is not one of {', '.join(_TABLE)}")
    return found
