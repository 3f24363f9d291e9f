"""The keys of FP8 and of Transformer Engine, under NeMo's names where NeMo has one, else under megatron-core's."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from her_nemo.config.sections import Section, knob

Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
# Transformer Engine's own default of the format: with a scale a block, e5m2's range is not needed for gradients.
_E4M3_RECIPES = ("blockwise", "mxfp8")


class Fp8Keys(Section):
    """`model.fp8*` and the keys that go with them; what they mean is in docs/precision.md."""

    transformer_engine: bool | None = knob(
        None, "Layers of Transformer Engine; null takes them in bf16 and FP8 where it is installed, never in 32."
    )
    fp8: bool = knob(False, "Matrix products of the layers in FP8, through Transformer Engine.")
    fp8_e4m3: bool = knob(False, "Every FP8 tensor in e4m3.")
    fp8_hybrid: bool = knob(
        False, "e4m3 forward, e5m2 for gradients. Neither given: hybrid, with blockwise and mxfp8 e4m3."
    )
    fp8_recipe: Fp8Recipe = knob(
        "delayed", "How scales are found: from past steps, of each tensor, of 128-blocks, of 32-blocks (Blackwell)."
    )
    fp8_margin: NonNegativeInt = knob(0, "delayed: scales leave this many powers of two of room.")
    fp8_amax_history_len: PositiveInt = knob(1024, "delayed: steps whose largest values are remembered.")
    fp8_amax_compute_algo: Literal["max", "most_recent"] = knob(
        "max", "delayed: the scale follows the largest value remembered, or the newest."
    )
    fp8_params: bool = knob(
        False, "Keep the layers' matrices in FP8 alone; needs model.optim.name=distributed_fused_adam."
    )
    first_last_layers_bf16: bool = knob(False, "Leave the first and the last layers in bf16; not with delayed.")
    num_layers_at_start_in_bf16: NonNegativeInt = knob(1, "first_last_layers_bf16: layers at the start.")
    num_layers_at_end_in_bf16: NonNegativeInt = knob(1, "first_last_layers_bf16: layers at the end.")

    @property
    def fp8_format(self) -> Literal["e4m3", "hybrid"]:
        """megatron-core's name of the format."""
        plain = not self.fp8_hybrid and self.fp8_recipe in _E4M3_RECIPES
        return "e4m3" if self.fp8_e4m3 or plain else "hybrid"

    @property
    def layers_in_bf16(self) -> tuple[int, int]:
        """Layers left in bf16 at the start and at the end."""
        if not self.first_last_layers_bf16:
            return 0, 0
        return self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16
