"""One layer of a checkpoint at a time through megatron-core, for models that do not fit into memory whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from her_nemo.megatron import platform, qwen3
from her_nemo.megatron.qwen3 import Head, Qwen3Shape
from her_nemo.megatron.qwen3_map import STORED_AS
from her_nemo.megatron.torch_dist import TorchDist

_LAYER = "decoder.layers.0."
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


class LayerRows(Protocol):
    """Tensors under megatron-core's names, of a checkpoint, read in rows."""

    def shape(self, key: str) -> tuple[int, ...]: ...

    def rows(self, key: str, layer: int | None, start: int, stop: int) -> torch.Tensor: ...

    def close(self) -> None: ...


class SingleLayer:
    """A one-layer model in fp32 whose layer is filled from the checkpoint's own tensors, not through the map.

    Weights are rounded to `dtype` first, the one of the export, so that both sides compute with the same numbers.
    Needs megatron-core's groups with no tensor or pipeline parallelism.
    """

    def __init__(self, held: Path | LayerRows, shape: Qwen3Shape, head: Head, dtype: torch.dtype) -> None:
        self.shape, self.head, self.dtype = shape, head, dtype
        self._held: LayerRows = TorchDist(held) if isinstance(held, Path) else held
        # The embedding is read row by row: a tiny one stands in its place.
        small = replace(shape, num_layers=1, vocab_size=1, tied=True)
        model = qwen3.build(small, dtype=torch.float32, trainable=False, make_vocab_size_divisible_by=1)
        self._module = model.bare()

    @torch.no_grad()
    def load(self, layer: int) -> None:
        """Fill the layer from layer `layer` of the checkpoint."""
        for name, parameter in self._module.named_parameters():
            if name.startswith(_LAYER):
                own = name.removeprefix(_LAYER)
                stored = self._read(f"decoder.layers.{STORED_AS.get(own, own)}", layer)
                if stored.shape != parameter.shape:
                    raise RuntimeError(f"{name}: {tuple(stored.shape)} read for {tuple(parameter.shape)}")
                parameter.copy_(stored)

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
        norm.weight.copy_(self._read("decoder.final_layernorm.weight", None))
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

    def _read(self, key: str, layer: int | None) -> torch.Tensor:
        size = self._held.shape(key)
        return self._held.rows(key, layer, 0, size[0 if layer is None else 1]).to(self.dtype)

    def close(self) -> None:
        self._held.close()
