"""Token-by-token decoding with the trainer's own model: a KV cache, under tensor and pipeline parallelism.

Prompts of different lengths share a batch by padding on the *left*: every row then writes its next
key at the same cache position, and rotary embeddings, being relative, do not notice the shift. An
attention mask hides the padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.utils import set_model_to_sequence_parallel

from her_nemo.megatron import adapters, parallel, platform
from her_nemo.megatron.qwen3 import Model


class Decoder:
    """One left-padded batch on its way through the model; every rank of the replica makes the same calls.

    Args:
        model: a language model (head "lm") with one chunk per pipeline stage.
        valid_BP: bool, True at prompt tokens and False at the padding before them.
        max_length: prompt length P plus the most tokens that will be generated.
    """

    def __init__(self, model: Model, valid_BP: torch.Tensor, max_length: int) -> None:
        self._module = model.bare()
        self._config = self._module.config
        batch, prompt = valid_BP.shape
        self._batch = batch
        self._valid_BK = torch.ones(batch, max_length, dtype=torch.bool, device=platform.device())
        self._valid_BK[:, :prompt] = valid_BP
        self._context = StaticInferenceContext(max_batch_size=batch, max_sequence_length=max_length)

    def advance(self, tokens_BS: torch.Tensor) -> torch.Tensor | None:
        """Feed the next S tokens of every row.

        Returns the logits [B, V] (fp32, whole vocabulary with its padding) of the token to come, on the
        ranks of the last pipeline stage; None on the others.
        """
        start = self._context.sequence_len_offset
        length = tokens_BS.shape[1]
        if not parallel.is_first_stage():
            hidden = torch.empty(
                length,
                self._batch,
                self._config.hidden_size,
                dtype=self._config.pipeline_dtype,
                device=platform.device(),
            )
            torch.distributed.recv(hidden, src=parallel.previous_stage_rank())
            self._module.set_input_tensor(hidden)
        positions_BS = torch.arange(start, start + length, device=tokens_BS.device).expand_as(tokens_BS)
        output = self._module(
            tokens_BS,
            positions_BS,
            self._mask(start, length),
            inference_context=self._context,
            runtime_gather_output=True,
        )
        self._context.sequence_len_offset += length
        self._context.enable_decode_mode()
        if not parallel.is_last_stage():
            torch.distributed.send(output.contiguous(), dst=parallel.next_stage_rank())
            return None
        return output[:, -1].float()

    def repeat(self, rows_B: torch.Tensor) -> None:
        """Go on with other rows: row i with what row `rows_B[i]` has been fed so far."""
        self._batch = len(rows_B)
        self._valid_BK = self._valid_BK.index_select(0, rows_B)
        self._context.max_batch_size = self._batch
        held = self._context.key_value_memory_dict
        for layer, (keys, values) in held.items():
            held[layer] = keys.index_select(1, rows_B), values.index_select(1, rows_B)

    def _mask(self, start: int, length: int) -> torch.Tensor:
        """[B, 1, S, K] in Megatron's sense: True is hidden. A padding row sees itself, or softmax is empty."""
        end = start + length
        query = torch.arange(start, end, device=self._valid_BK.device)
        key = torch.arange(end, device=self._valid_BK.device)
        causal_SK = key[None, :] <= query[:, None]
        itself_SK = key[None, :] == query[:, None]
        visible = (causal_SK[None] & self._valid_BK[:, None, :end]) | itself_SK[None]
        return ~visible[:, None]


@contextmanager
def decoding(model: Model) -> Iterator[None]:
    """The model in evaluation mode, without gradients and without sequence parallelism: one token a
    step cannot be split over the sequence. Nor is it 16 rows for an FP8 matrix product, so decoding is in
    bf16. Adapters are on or off as the model says. Training settings come back on leaving."""
    module = model.bare()
    was_training = module.training
    sequence_parallel, fp8 = module.config.sequence_parallel, module.config.fp8
    module.eval()
    module.config.fp8 = None
    if sequence_parallel:
        set_model_to_sequence_parallel(module, False)
    try:
        with adapters.running(model, learning=False), torch.inference_mode():
            yield
    finally:
        module.config.fp8 = fp8
        if sequence_parallel:
            set_model_to_sequence_parallel(module, True)
        module.train(was_training)
