"""Forward and backward through megatron-core's schedules, the same call at every parallel layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from her_nemo.megatron import adapters, parallel, platform, shared_prompts
from her_nemo.megatron.log_probs import vocab_parallel_log_probs
from her_nemo.megatron.qwen3 import Model
from her_nemo.megatron.shared_prompts import SharedPrompts

MicroBatch = dict[str, torch.Tensor]
_SHARED = "shared_prompts"  # in a micro-batch: its layout (SharedPrompts), where prompts are shared


@dataclass
class TokenOutputs:
    """What a forward says about each token. T = S - 1: index t is the prediction of token t + 1."""

    log_probs_BT: torch.Tensor | None = None
    """fp32 log-probability of token t + 1 (language-model head)."""
    entropy_BT: torch.Tensor | None = None
    """fp32 entropy in nats of the distribution of token t + 1, if asked for."""
    values_BS: torch.Tensor | None = None
    """fp32 value at token t (scalar head)."""


LossFn = Callable[[TokenOutputs, MicroBatch], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]
Collect = Callable[[TokenOutputs], torch.Tensor]


def forward_backward(
    model: Model,
    micro_batches: Sequence[MicroBatch],
    loss_fn: LossFn,
    *,
    with_entropy: bool = False,
    temperature: float = 1.0,
) -> list[dict[str, torch.Tensor]]:
    """Accumulate gradients of sum(loss_sum) / sum(count), over all micro-batches and data-parallel ranks.

    Every micro-batch holds `tokens_BS` (int64, padded on the right), optionally `attention_mask` (bool, True where
    attention is not allowed, [B, 1, S, S]) or `cu_seqlens` (int32, B is then 1: borders of packed sequences, from 0 to
    S), optionally `prompt_group_B` (rows that share a prompt, computed once: shared_prompts.py), and whatever
    `loss_fn(outputs, micro_batch)` reads. It returns
    (loss_sum, count, metrics): the sum to differentiate, how many tokens it covers (or the sum of their weights, which
    need not be whole), and sums to report. All ranks
    of one replica pass the same micro-batches, all of one shape; every rank passes the same number of them.
    Returns the detached metrics of each micro-batch plus `loss_sum` and `count`, on every rank of the replica,
    not summed over replicas. Gradients are reduced and ready for `optimizer.step()`.
    """
    if not model.trainable:
        raise ValueError("forward_backward needs a model built with trainable=True")
    _clear_gradients(model)
    reports = _run(
        model, micro_batches, partial(_loss_step, loss_fn), with_entropy, temperature, forward_only=False
    )
    _divide_exactly(model, reports)
    return reports


@torch.no_grad()
def evaluate(
    model: Model,
    micro_batches: Sequence[MicroBatch],
    loss_fn: LossFn,
    *,
    with_entropy: bool = False,
    temperature: float = 1.0,
) -> list[dict[str, torch.Tensor]]:
    """The metrics that `forward_backward` would return, without gradients (validation loss). Shapes may differ."""
    results: list[dict[str, torch.Tensor]] = []
    for group in _same_shape(micro_batches):
        results += _run(
            model, group, partial(_loss_step, loss_fn), with_entropy, temperature, forward_only=True
        )
    return results


def log_probs(
    model: Model, micro_batches: Sequence[MicroBatch], *, temperature: float = 1.0
) -> list[torch.Tensor]:
    """fp32 log-probabilities [B, S-1] of each micro-batch, no gradients, on every rank of the replica."""
    return [out["log_probs_BT"] for out in outputs(model, micro_batches, temperature=temperature)]


def values(model: Model, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    """fp32 values [B, S] of each micro-batch from a scalar-headed model, no gradients, on every rank."""
    return [out["values_BS"] for out in outputs(model, micro_batches)]


@torch.no_grad()
def outputs(
    model: Model, micro_batches: Sequence[MicroBatch], *, with_entropy: bool = False, temperature: float = 1.0
) -> list[dict[str, torch.Tensor]]:
    """Everything a forward says, per micro-batch: `log_probs_BT` (and `entropy_BT`) or `values_BS`, fp32.

    No gradients; on every rank of the replica; micro-batches may differ in shape.
    """

    def collect(said: TokenOutputs, _: MicroBatch) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(said).items() if value is not None}

    results: list[dict[str, torch.Tensor]] = []
    for group in _same_shape(micro_batches):
        results += _run(
            model, group, partial(_collect_step, collect), with_entropy, temperature, forward_only=True
        )
    return results


@torch.no_grad()
def logits(model: Model, tokens_BS: torch.Tensor) -> torch.Tensor:
    """fp32 logits [B, S, V] of the whole, unpadded vocabulary, on every rank of the replica.

    Gathers the vocabulary: for proofs on a few sequences, never for training. S must divide by the tensor-parallel
    size under sequence parallelism.
    """

    def step(
        data_iterator: Iterator[MicroBatch], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        tokens = to_device(next(data_iterator))["tokens_BS"]
        raw = chunk(input_ids=tokens, position_ids=None, attention_mask=None)

        def finish(found: torch.Tensor) -> Any:
            whole = gather_from_tensor_model_parallel_region(found)[..., : model.shape.vocab_size]
            zero = whole.new_zeros(())
            return zero, zero.to(torch.int), {"logits": whole.float().contiguous()}

        return raw, finish

    batch, length = tokens_BS.shape
    with adapters.running(model, learning=False):
        data = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([{"tokens_BS": tokens_BS}]),
            model=model.chunks,
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=batch,
            forward_only=True,
        )
    return _share(data, 1)[0]["logits"]


def assert_finite(loss_sum: torch.Tensor | float, step: int) -> None:
    """Raise FloatingPointError on every rank if `loss_sum` is not finite on any. Call before `optimizer.step()`."""
    mine = math.isfinite(float(loss_sum))
    if parallel.any_rank(not mine):
        where = f"on this rank: {float(loss_sum)}" if not mine else "on another rank"
        raise FloatingPointError(f"step {step}: the loss is not finite ({where}). Stopped before the update.")


def _whole(count: torch.Tensor) -> torch.Tensor:
    """The count that megatron-core gets: it knows integers only."""
    return count.double().ceil()


def _divide_exactly(model: Model, reports: list[dict[str, torch.Tensor]]) -> None:
    """megatron-core has divided the gradients by the sum of whole counts; make it the sum of the counts."""
    pairs = [torch.stack([report["count"].double(), _whole(report["count"])]) for report in reports]
    exact, whole = parallel.data_all_reduce(torch.stack(pairs).sum(0)).tolist()
    if exact not in (0.0, whole):
        for chunk in model.chunks:
            chunk.scale_gradients(whole / exact)


def _clear_gradients(model: Model) -> None:
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
        # The optimizers alias param.grad to the gradient buffer; a stale alias would count gradients twice.
        for parameter in chunk.parameters():
            parameter.grad = None


def _same_shape(micro_batches: Sequence[MicroBatch]) -> Iterator[list[MicroBatch]]:
    """Runs of consecutive micro-batches with equal token shapes: a schedule moves tensors of one shape."""
    group: list[MicroBatch] = []
    for micro_batch in micro_batches:
        if group and group[-1]["tokens_BS"].shape != micro_batch["tokens_BS"].shape:
            yield group
            group = []
        group.append(micro_batch)
    if group:
        yield group


def _run(
    model: Model,
    micro_batches: Sequence[MicroBatch],
    make_step: Callable[..., Any],
    with_entropy: bool,
    temperature: float,
    forward_only: bool,
) -> list[dict[str, torch.Tensor]]:
    if not micro_batches:
        raise ValueError("no micro-batches: every rank must pass at least one")
    shapes = {tuple(micro_batch["tokens_BS"].shape) for micro_batch in micro_batches}
    if len(shapes) > 1:
        raise ValueError(f"micro-batches of one step must have one shape, not {sorted(shapes)}")
    batch, length = next(iter(shapes))
    rows = 1 if shared_prompts.GROUP in micro_batches[0] else batch
    unit = model.precision.multiple(rows) * (parallel.tensor_size() if model.config.sequence_parallel else 1)
    padding = -length % unit
    shared = shared_prompts.layouts(micro_batches, model.head, unit)
    if shared is not None:
        micro_batches = [rows | {_SHARED: one} for rows, one in zip(micro_batches, shared, strict=True)]
        batch, length, padding = 1, shared[0].tokens_1N.shape[1], 0
    schedule = get_forward_backward_func()
    with adapters.running(model, learning=not forward_only):
        data = schedule(
            forward_step_func=partial(_forward_step, model, make_step, with_entropy, temperature, padding),
            data_iterator=iter(micro_batches),
            model=model.chunks,
            num_microbatches=len(micro_batches),
            seq_length=length + padding,
            micro_batch_size=batch,
            forward_only=forward_only,
        )
    return _share(data, len(micro_batches))


def _forward_step(
    model: Model,
    make_step: Callable[..., Any],
    with_entropy: bool,
    temperature: float,
    padding: int,
    data_iterator: Iterator[MicroBatch],
    chunk: torch.nn.Module,
) -> tuple[torch.Tensor, Callable[..., Any]]:
    micro_batch = to_device(next(data_iterator))
    tokens = micro_batch["tokens_BS"]
    shared = micro_batch.get(_SHARED)
    if shared is not None:
        with shared.on(model.bare()):
            said = chunk(shared.tokens_1N, position_ids=None, attention_mask=None, packed_seq_params=shared)

        def spread(raw: torch.Tensor) -> Any:
            return make_step(_shared_outputs(model, raw, tokens, shared, with_entropy, temperature), micro_batch)

        return said, spread
    mask = micro_batch.get("attention_mask")
    inputs = tokens
    if padding:
        inputs = F.pad(tokens, (0, padding))
        if mask is not None:
            mask = F.pad(mask, (0, padding, 0, padding), value=True)
    hidden_or_logits = chunk(
        input_ids=inputs, position_ids=None, attention_mask=mask, packed_seq_params=_packed(micro_batch, padding)
    )

    def finish(raw: torch.Tensor) -> Any:
        return make_step(_token_outputs(model, raw, tokens, with_entropy, temperature), micro_batch)

    return hidden_or_logits, finish


def _packed(micro_batch: MicroBatch, padding: int) -> PackedSeqParams | None:
    """megatron-core's description of a packed row, the padding added to it being one sequence more."""
    borders = micro_batch.get("cu_seqlens")
    if borders is None:
        return None
    if micro_batch["tokens_BS"].shape[0] != 1:
        raise ValueError(f"packed rows come one to a micro-batch, not {micro_batch['tokens_BS'].shape[0]}")
    if padding:
        borders = F.pad(borders, (0, 1), value=int(borders[-1]) + padding)
    # The true maximum: with the length of the row in its place, megatron-core's rotary embedding would number
    # positions through the row and not begin again at each sequence.
    longest = int(borders.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _token_outputs(
    model: Model, raw: torch.Tensor, tokens: torch.Tensor, with_entropy: bool, temperature: float
) -> TokenOutputs:
    """raw [B, S + padding, V/tp or 1] as the last stage returns it -> outputs of the real positions."""
    length = tokens.shape[1]
    if model.head == "scalar":
        return TokenOutputs(values_BS=raw[:, :length, 0])
    # The last position predicts nothing that is known: a dummy target keeps the logits contiguous.
    target = F.pad(tokens[:, 1:], (0, raw.shape[1] - length + 1))
    found, entropy = vocab_parallel_log_probs(
        raw,
        target,
        vocab_size=model.shape.vocab_size,
        temperature=temperature,
        group=parallel_state.get_tensor_model_parallel_group(),
        with_entropy=with_entropy,
    )
    return TokenOutputs(
        log_probs_BT=found[:, : length - 1],
        entropy_BT=None if entropy is None else entropy[:, : length - 1],
    )


def _shared_outputs(
    model: Model,
    raw: torch.Tensor,
    tokens: torch.Tensor,
    shared: SharedPrompts,
    with_entropy: bool,
    temperature: float,
) -> TokenOutputs:
    """The same of a packed row whose prompts are shared: outputs of reply tokens, 0 at all others."""
    if model.config.sequence_parallel:
        raw = raw.index_select(1, shared.source_L)
    rows, length = tokens.shape
    if model.head == "scalar":
        return TokenOutputs(values_BS=shared.spread(raw[..., 0], rows, length))
    found, entropy = vocab_parallel_log_probs(
        raw,
        tokens.flatten().index_select(0, shared.target_L + 1).unsqueeze(0),
        vocab_size=model.shape.vocab_size,
        temperature=temperature,
        group=parallel_state.get_tensor_model_parallel_group(),
        with_entropy=with_entropy,
    )
    return TokenOutputs(
        log_probs_BT=shared.spread(found, rows, length)[:, :-1],
        entropy_BT=None if entropy is None else shared.spread(entropy, rows, length)[:, :-1],
    )


def _loss_step(
    loss_fn: LossFn, said: TokenOutputs, micro_batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    loss_sum, count, metrics = loss_fn(said, micro_batch)
    count = torch.as_tensor(count, device=loss_sum.device)
    # The schedule scales the loss in place in some configurations: report a copy.
    report = {name: torch.as_tensor(value).detach().clone() for name, value in metrics.items()}
    report |= {"loss_sum": loss_sum.detach().clone(), "count": count.detach().clone()}
    return loss_sum, _whole(count).to(torch.int), report


def _collect_step(
    collect: Callable[..., dict[str, torch.Tensor]], said: TokenOutputs, micro_batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    found = {name: value.contiguous() for name, value in collect(said, micro_batch).items()}
    zero = next(iter(found.values())).new_zeros(())
    return zero, zero.to(torch.int), found


def to_device(micro_batch: MicroBatch) -> MicroBatch:
    """The micro-batch with its tensors on `platform.device()`."""
    where = platform.device()
    return {
        name: value.to(where, non_blocking=True) if torch.is_tensor(value) else value
        for name, value in micro_batch.items()
    }


def _share(data: list[dict[str, torch.Tensor]], count: int) -> list[dict[str, torch.Tensor]]:
    """Give the last stage's reports to every stage: one small header, then one tensor per dtype-free value."""
    if parallel.pipeline_size() == 1:
        return data
    last = parallel.is_last_stage()
    layout = [{name: (tuple(value.shape), value.dtype) for name, value in report.items()} for report in data]
    layout = parallel.broadcast_object_from_last_stage(layout if last else None)
    if len(layout) != count:
        raise RuntimeError(f"the last stage reported {len(layout)} micro-batches of {count}")
    where = platform.device()
    size = sum(math.prod(shape) for report in layout for shape, _ in report.values())
    # float64 holds every float32 and every count below 2^53 exactly: one message for all of them.
    if last:
        parts = [value.reshape(-1).to(where, torch.float64) for report in data for value in report.values()]
        flat = torch.cat(parts)
    else:
        flat = torch.empty(size, dtype=torch.float64, device=where)
    parallel.broadcast_from_last_stage(flat)
    if last:
        return data
    shared, start = [], 0
    for report in layout:
        mine = {}
        for name, (shape, dtype) in report.items():
            stop = start + math.prod(shape)
            mine[name] = flat[start:stop].view(shape).to(dtype)
            start = stop
        shared.append(mine)
    return shared
