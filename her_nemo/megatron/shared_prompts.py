"""Replies to one prompt in one packed row that holds the prompt once.

A row [1, N] is, group by group, the prompt's tokens and then those of each reply; there is no padding between them. All
that works token by token (embedding, projections, MLP, norms) then runs on each prompt once instead of once a reply.
Positions begin again behind the prompt for every reply, and attention lets a reply see its prompt and itself: the same
numbers as a row a reply, up to the order of floating-point sums. Only predictions of reply tokens go through the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams

GROUP = "prompt_group_B"
"""Key of a micro-batch: [B] int64, equal numbers for neighbouring rows that begin with the same prompt."""


@dataclass(frozen=True)
class Group:
    """One prompt and its replies inside the packed row."""

    begin: int
    prompt: int
    replies: tuple[int, ...]
    """Tokens of the prompt, and of each reply."""
    gather_GR: torch.Tensor | None
    """[G * R] places of the replies' tokens, each reply padded to the longest; None where all are of one length."""
    keep: torch.Tensor | None
    """[sum of replies] which of the G * R places are no padding."""
    mask_RK: torch.Tensor
    """[R, prompt + R] bool, True where a reply's token may look: all of the prompt, and the reply up to itself."""

    @property
    def end(self) -> int:
        return self.begin + self.prompt + sum(self.replies)


@dataclass
class SharedPrompts(PackedSeqParams):
    """The layout of one micro-batch. megatron-core passes it down to the core attention as it is: its own code only
    unpacks the format "thd"."""

    tokens_1N: torch.Tensor | None = None
    positions_N: torch.Tensor | None = None
    groups: tuple[Group, ...] = ()
    source_L: torch.Tensor | None = None
    """Place in the packed row that each prediction comes from."""
    target_L: torch.Tensor | None = None
    """Its place in the flattened [B, S] rows: t of the prediction of token t + 1."""

    @property
    def used(self) -> int:
        """Tokens of the packed row that are no padding behind its end."""
        return self.groups[-1].end

    def padded(self, length: int) -> SharedPrompts:
        """Lengthen the row: a pipeline moves tensors of one shape, some kernels want multiples."""
        assert self.tokens_1N is not None
        assert self.positions_N is not None
        more = length - self.tokens_1N.shape[1]
        self.tokens_1N, self.positions_N = F.pad(self.tokens_1N, (0, more)), F.pad(self.positions_N, (0, more))
        return self

    @contextmanager
    def on(self, module: GPTModel) -> Iterator[None]:
        """While a forward of `module` runs on the packed row: rotary positions as in the rows of their own, and the
        head on the predictions alone. Not so under sequence parallelism, where the head itself gathers the row."""
        positions, source = self.positions_N, self.source_L
        hooks = [module.rotary_pos_emb.register_forward_hook(lambda _m, _a, table: table.index_select(0, positions))]
        if module.post_process and not module.config.sequence_parallel:
            hooks.append(
                module.output_layer.register_forward_pre_hook(
                    lambda _m, given: (given[0].index_select(0, source), *given[1:])
                )
            )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def spread(self, found_1L: torch.Tensor, rows: int, length: int) -> torch.Tensor:
        """A number a prediction -> [rows, length], 0 where nothing was predicted."""
        assert self.target_L is not None
        return found_1L.new_zeros(rows * length).scatter(0, self.target_L, found_1L[0]).view(rows, length)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None, grouped: bool
    ) -> torch.Tensor:
        """Core attention: query [N, 1, heads, D], key and value [N, 1, kv heads, D] -> [N, 1, heads * D].

        A prompt attends causally to itself; the replies of a group are a batch that attends to the prompt's keys, which
        they share, and to its own.
        """
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        parts = []
        for group in self.groups:
            first, border = group.begin, group.begin + group.prompt
            parts.append(
                _sdpa(
                    *(x[first:border].unsqueeze(0) for x in (query, key, value)),
                    causal=True, scale=scale, grouped=grouped,
                )[0]
            )  # fmt: skip
            own = [_rows(x, group) for x in (query, key, value)]
            shared = [x[first:border].unsqueeze(0).expand(len(group.replies), -1, -1, -1) for x in (key, value)]
            keys, values = (torch.cat(pair, dim=1) for pair in zip(shared, own[1:], strict=True))
            found = _sdpa(own[0], keys, values, mask=group.mask_RK, scale=scale, grouped=grouped).flatten(0, 1)
            parts.append(found if group.keep is None else found.index_select(0, group.keep))
        if len(query) > self.used:
            parts.append(parts[0].new_zeros(len(query) - self.used, parts[0].shape[1]))
        return torch.cat(parts).unsqueeze(1)


def layouts(micro_batches: Sequence[dict[str, torch.Tensor]], head: str, multiple: int) -> list[SharedPrompts] | None:
    """One layout a micro-batch, all of one length, which `multiple` divides; None if they do not share prompts."""
    if GROUP not in micro_batches[0]:
        return None
    found = [layout(micro_batch, head) for micro_batch in micro_batches]
    longest = max(one.used for one in found)
    return [one.padded(longest + -longest % multiple) for one in found]


def layout(micro_batch: dict[str, torch.Tensor], head: str) -> SharedPrompts:
    """Pack `tokens_BS` by `prompt_lengths_B`, `lengths_B` and `prompt_group_B`.

    Predictions are those of reply tokens, t = p-1 .. n-2; of a scalar head also the last token's, t = n-1.

    Raises:
        ValueError: rows of one group begin with different prompts.
    """
    tokens_BS = micro_batch["tokens_BS"]
    device, length = tokens_BS.device, tokens_BS.shape[1]
    prompts, ends = micro_batch["prompt_lengths_B"].tolist(), micro_batch["lengths_B"].tolist()
    more = 1 if head == "scalar" else 0
    places: list[torch.Tensor] = []  # of the packed tokens in the flattened rows
    sources: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    groups: list[Group] = []
    begin = 0
    for rows in neighbours(micro_batch[GROUP].tolist()):
        first, prompt = rows[0], prompts[rows[0]]
        if any(prompts[row] != prompt for row in rows) or not _same_prompt(tokens_BS, rows, prompt):
            raise ValueError(f"rows {rows[0]} to {rows[-1]} are said to share a prompt and do not")
        places.append(torch.arange(first * length, first * length + prompt))
        reply = begin + prompt
        for row in rows:
            size = ends[row] - prompt
            places.append(torch.arange(row * length + prompt, row * length + ends[row]))
            # The prompt's last token predicts the first of every reply.
            sources += [torch.tensor([begin + prompt - 1]), torch.arange(reply, reply + size - 1 + more)]
            targets.append(torch.arange(row * length + prompt - 1, row * length + ends[row] - 1 + more))
            reply += size
        groups.append(_group(begin, prompt, [ends[row] - prompt for row in rows], device))
        begin = groups[-1].end
    index_N = torch.cat(places).to(device)
    longest = max(ends)
    return SharedPrompts(
        qkv_format="sbhd",
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_1N=tokens_BS.flatten().index_select(0, index_N).unsqueeze(0),
        positions_N=index_N % length,
        groups=tuple(groups),
        source_L=torch.cat(sources).to(device),
        target_L=torch.cat(targets).to(device),
    )


def neighbours(numbers: Sequence[int]) -> list[list[int]]:
    """Indices of runs of equal numbers: [7, 7, 3] -> [[0, 1], [2]]."""
    runs: list[list[int]] = []
    for index, number in enumerate(numbers):
        if runs and numbers[runs[-1][-1]] == number:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _same_prompt(tokens_BS: torch.Tensor, rows: Sequence[int], prompt: int) -> bool:
    block = tokens_BS[rows[0] : rows[-1] + 1, :prompt]
    return bool((block == block[:1]).all())


def _group(begin: int, prompt: int, replies: Sequence[int], device: torch.device) -> Group:
    longest = max(replies)
    mask_RK = torch.ones(longest, prompt + longest, dtype=torch.bool, device=device).tril(prompt)
    gather = keep = None
    if any(size != longest for size in replies):
        inside_GR = torch.arange(longest)[None] < torch.tensor(replies)[:, None]
        starts_G = torch.tensor(replies).cumsum(0) - torch.tensor(replies) + begin + prompt
        # Padding reads the reply's first token; nothing looks at it, since it comes last.
        gather = (starts_G[:, None] + torch.arange(longest)[None] * inside_GR).flatten().to(device)
        keep = inside_GR.flatten().nonzero()[:, 0].to(device)
    return Group(begin, prompt, tuple(replies), gather, keep, mask_RK)


def _rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[N, heads, D] -> [G, R, heads, D], the replies of a group."""
    first = group.begin + group.prompt
    flat = x[first : group.end] if group.gather_GR is None else x.index_select(0, group.gather_GR)
    return flat.unflatten(0, (len(group.replies), -1))


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None,
    grouped: bool,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, S, heads, D] each -> [B, S, heads * D]."""
    found = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped,
    )  # fmt: skip
    return found.transpose(1, 2).flatten(2)
