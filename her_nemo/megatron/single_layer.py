"""One layer of a checkpoint at a time through megatron-core, for models that do not fit into memory whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from her_nemo.megatron import platform, qwen3
from her_nemo.megatron.passing_weights import read_when_used
from her_nemo.megatron.qwen3 import Head, Qwen3Shape
from her_nemo.megatron.qwen3_map import STORED_AS
from her_nemo.megatron.torch_dist import TorchDist

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_FINAL_NORM = "decoder.final_layernorm.weight"


class LayerRows(Protocol):
    """Tensors under megatron-core's names, of a checkpoint, read in rows."""

    def shape(self, key: str) -> tuple[int, ...]: ...

    def rows(self, key: str, layer: int | None, start: int, stop: int) -> torch.Tensor: ...

    def close(self) -> None: ...


class SingleLayer:
    """A one-layer model in fp32 that computes with the checkpoint's own tensors, not read through the map.

    Weights are rounded to `dtype` first, the one of the export, so that both sides compute with the same numbers. In
    memory are those of one linear map at a time: two layers of Qwen3-32B in fp32 would be 4 GB.
    Needs megatron-core's groups with no tensor or pipeline parallelism.
    """

    def __init__(self, held: Path | LayerRows, shape: Qwen3Shape, head: Head, dtype: torch.dtype) -> None:
        self.shape, self.head, self.dtype = shape, head, dtype
        self._held: LayerRows = TorchDist(held) if isinstance(held, Path) else held
        # The embedding is read row by row: a tiny one stands in its place.
        small = replace(shape, num_layers=1, vocab_size=1, tied=True)
        model = qwen3.build(
            small, dtype=torch.float32, trainable=False, make_vocab_size_divisible_by=1, initialise=False
        )
        self._module = model.bare()
        self._layer = 0
        read_when_used(self._module.decoder.layers[0], self._rows_of_layer, platform.device())

    def choose(self, layer: int) -> None:
        """`attention` and `mlp` are from now on those of layer `layer` of the checkpoint."""
        self._layer = layer

    def _rows_of_layer(self, name: str, start: int, stop: int) -> torch.Tensor:
        key = f"decoder.layers.{STORED_AS.get(name, name)}"
        return self._held.rows(key, self._layer, start, stop).to(self.dtype)

    @torch.no_grad()
    def attention(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        """What attention adds to the residual stream [B, S, H], its norm included."""
        layer = self._module.decoder.layers[0]
        hidden = hidden_BSH.transpose(0, 1).contiguous().to(platform.device())
        rotary = self._module.rotary_pos_emb(hidden.shape[0])
        found, _ = layer.self_attention(
            layer.input_layernorm(hidden), attention_mask=None, rotary_pos_emb=rotary
        )
        return found.transpose(0, 1).cpu()

    @torch.no_grad()
    def mlp(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        """What the feed-forward adds to the residual stream [B, S, H], its norm included."""
        layer = self._module.decoder.layers[0]
        hidden = hidden_BSH.transpose(0, 1).contiguous().to(platform.device())
        found, _ = layer.mlp(layer.pre_mlp_layernorm(hidden))
        return found.transpose(0, 1).cpu()

    @torch.no_grad()
    def head_outputs(self, hidden_BSH: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Logits [B, S, len(rows)] of some vocabulary entries, or the score [B, S, 1], from the last hidden states."""
        norm = self._module.decoder.final_layernorm
        norm.weight.copy_(self._held.rows(_FINAL_NORM, None, 0, norm.weight.shape[0]).to(self.dtype))
        key = _EMBEDDING if self.head == "lm" and self.shape.tied else _OUTPUT
        weight = self._rows(key, rows if self.head == "lm" else [0])
        last = norm(hidden_BSH.to(platform.device())).cpu()
        return torch.nn.functional.linear(last, weight)

    def embeddings(self, rows: list[int]) -> torch.Tensor:
        """Rows of the embedding [len(rows), H]."""
        return self._rows(_EMBEDDING, rows)

    def _rows(self, key: str, rows: list[int]) -> torch.Tensor:
        found = torch.cat([self._held.rows(key, None, row, row + 1) for row in rows])
        return found.to(self.dtype).float()

    def close(self) -> None:
        self._held.close()
