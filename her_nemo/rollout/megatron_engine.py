"""Rollouts from the trainer's own weights: no second copy of the model, nothing to synchronise.

Each data-parallel replica generates for the prompts it is given; the tensor- and pipeline-parallel
ranks inside a replica make the same calls and end with the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from her_nemo.config.errors import UserError
from her_nemo.megatron import parallel, platform
from her_nemo.megatron.decoding import Decoder, decoding
from her_nemo.megatron.qwen3 import Model
from her_nemo.rollout.engine import Rollout, Sampling


class MegatronEngine:
    """Batched sampling with a KV cache through the live Megatron model.

    Args:
        model: the actor, as it trains.
        pad_id: token written left of short prompts; the attention mask hides it.
        micro_batch_size: sequences decoded together; bounds the KV cache.
        share_prompts: replies to one prompt get its keys and values from one prefill.
    """

    def __init__(
        self, model: Model, *, pad_id: int, micro_batch_size: int, share_prompts: bool = False
    ) -> None:
        self._model = model
        self._pad_id = pad_id
        self._micro_batch_size = micro_batch_size
        self._share_prompts = share_prompts
        self._version = 0
        self.staleness = 0

    def start(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seed: int,
        indices: Sequence[int] | None = None,
    ) -> None:
        """Not here: the model that generates is the one that trains."""
        del prompts, sampling, seed, indices
        raise UserError("model.ppo.one_step_off needs model.ppo.rollout_engine=vllm")

    def rest(self) -> None:
        """Nothing to make room with: the cache of keys and values went when the last reply was done."""

    def tags(self) -> dict[str, float]:
        """Nothing beyond what the loop itself reports."""
        return {}

    def update_weights(self, named: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        """Nothing to copy, since the engine reads the trainer's tensors: only the version is noted.
        `named` stays unread, for gathering the weights would be the costly part."""
        del named
        self._version = version

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seed: int,
        *,
        indices: Sequence[int] | None = None,
    ) -> Rollout:
        """Sample one reply a prompt. See `RolloutEngine.generate`.

        The uniform number behind token t of reply i depends on (seed, indices[i], t) alone, so replies do
        not change with `micro_batch_size` or with the way the model is cut. Log-probs are those of the
        temperature-scaled distribution before top-k and top-p cut it, which the trainer can recompute.
        """
        rollout = Rollout.empty(prompts, weight_version=self._version)
        numbers = range(len(prompts)) if indices is None else indices
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        with decoding(self._model):
            for begin in range(0, len(order), self._micro_batch_size):
                chosen = order[begin : begin + self._micro_batch_size]
                replies, log_probs, finished = self._generate_batch(
                    [prompts[index] for index in chosen],
                    _uniforms(seed, [numbers[index] for index in chosen], sampling.max_tokens),
                    sampling,
                )
                for row, index in enumerate(chosen):
                    rollout.response_ids[index] = replies[row]
                    rollout.log_probs[index] = log_probs[row]
                    rollout.finished[index] = finished[row]
        return rollout

    def _generate_batch(
        self, prompts: list[list[int]], uniforms_BT: torch.Tensor, sampling: Sampling
    ) -> tuple[list[list[int]], list[list[float]], list[bool]]:
        device = platform.device()
        decoder, step_tokens, repeat_B = self._prefill_of(prompts, sampling.max_tokens)
        stops = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
        uniforms_BT = uniforms_BT.to(device)
        done_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        chosen: list[torch.Tensor] = []
        scored: list[torch.Tensor] = []
        for step in range(sampling.max_tokens):
            logits_BV = decoder.advance(step_tokens)
            if step == 0 and repeat_B is not None:
                decoder.repeat(repeat_B)
                logits_BV = None if logits_BV is None else logits_BV.index_select(0, repeat_B)
            picked = torch.zeros(2, len(prompts), dtype=torch.float64, device=device)
            if logits_BV is not None:
                ban = sampling.stop_ids if step < sampling.min_tokens else ()
                token_B, log_prob_B = sample(
                    logits_BV[:, : self._model.shape.vocab_size], uniforms_BT[:, step], sampling, ban
                )
                picked[0], picked[1] = token_B.double(), log_prob_B.double()
            parallel.broadcast_from_last_stage(picked)
            token_B = picked[0].long()
            chosen.append(torch.where(done_B, -1, token_B))
            scored.append(picked[1])
            done_B = done_B | torch.isin(token_B, stops)
            if bool(done_B.all()):
                break
            step_tokens = token_B[:, None]
        return _collect(torch.stack(chosen, 1), torch.stack(scored, 1), done_B)

    def _prefill_of(
        self, prompts: list[list[int]], max_tokens: int
    ) -> tuple[Decoder, torch.Tensor, torch.Tensor | None]:
        """A decoder, the left-padded prompts to begin with, and, where they are shared, which of them a reply is to."""
        device, repeat_B = platform.device(), None
        if self._share_prompts:
            rows: dict[tuple[int, ...], int] = {}
            repeat_B = torch.tensor([rows.setdefault(tuple(prompt), len(rows)) for prompt in prompts], device=device)
            prompts = [list(prompt) for prompt in rows]
        longest = max(len(prompt) for prompt in prompts)
        tokens_BP = torch.full((len(prompts), longest), self._pad_id, dtype=torch.long)
        valid_BP = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens_BP[row, longest - len(prompt) :] = torch.tensor(prompt)
            valid_BP[row, longest - len(prompt) :] = True
        decoder = Decoder(self._model, valid_BP.to(device), longest + max_tokens)
        return decoder, tokens_BP.to(device), repeat_B


def sample(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, sampling: Sampling, banned: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick a token a row by inverting the cumulative distribution at `uniform_B`; greedy at temperature 0.

    Returns (token_B int64, log_prob_B fp32), the latter under softmax(logits / temperature) before
    top-k, top-p and `banned` removed anything.
    """
    scale = sampling.temperature if sampling.temperature > 0 else 1.0
    log_probs_BV = torch.log_softmax(logits_BV.float() / scale, dim=-1)
    allowed_BV = log_probs_BV
    if banned:
        allowed_BV = allowed_BV.index_fill(1, torch.tensor(banned, device=logits_BV.device), float("-inf"))
    if sampling.temperature == 0:
        token_B = allowed_BV.argmax(dim=-1)
    else:
        probs_BV = allowed_BV.softmax(dim=-1)
        if sampling.top_k > 0 or sampling.top_p < 1:
            probs_BV = probs_BV.masked_fill(~_kept(probs_BV, sampling), 0.0)
        # In the order of the vocabulary, not of the probabilities: rounding swaps near-equal tokens of a sorted row,
        # and two layouts of one model would draw different tokens.
        cumulative_BV = probs_BV.double().cumsum(dim=-1)
        target_B1 = uniform_B.double()[:, None] * cumulative_BV[:, -1:]
        position_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
        # Where rounding put the target at the very end, the last token that can be drawn.
        last_B1 = torch.searchsorted(cumulative_BV, cumulative_BV[:, -1:].contiguous())
        token_B = torch.minimum(position_B1, last_B1).squeeze(1)
    return token_B, log_probs_BV.gather(1, token_B[:, None]).squeeze(1)


def _kept(probs_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[B, V] True at the tokens that top-k and top-p leave."""
    sorted_BV, index_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    keep_BV = sorted_BV.cumsum(dim=-1) - sorted_BV < sampling.top_p
    if sampling.top_k > 0:
        keep_BV[:, sampling.top_k :] = False
    return torch.zeros_like(keep_BV).scatter(1, index_BV, keep_BV)


def _uniforms(seed: int, indices: list[int], length: int) -> torch.Tensor:
    """Uniform numbers [B, T] in float64, a row from (seed, number of the prompt) alone."""
    rows = []
    for index in indices:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) & 0x7FFF_FFFF_FFFF_FFFF)
        rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def _collect(
    tokens_BT: torch.Tensor, log_probs_BT: torch.Tensor, done_B: torch.Tensor
) -> tuple[list[list[int]], list[list[float]], list[bool]]:
    """Cut every row at its end (later places hold -1)."""
    lengths = (tokens_BT >= 0).sum(dim=1).tolist()
    tokens, log_probs = tokens_BT.tolist(), log_probs_BT.tolist()
    replies = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    scores = [row[:length] for row, length in zip(log_probs, lengths, strict=True)]
    return replies, scores, [bool(flag) for flag in done_B.tolist()]
