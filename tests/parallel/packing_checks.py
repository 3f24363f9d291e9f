"""What each process of the packing test does: one global batch of samples, unpacked and packed, weighted and not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from qwen3_checks import build, far, new_optimizer, start
from qwen3_reference import VOCAB

from her_nemo.algorithms.masking import weigh_kinds
from her_nemo.config.sections import LayerWeights
from her_nemo.data.loaders import step_micro_batches
from her_nemo.data.packing import packed_micro_batches
from her_nemo.data.tokenise import Sample
from her_nemo.megatron import forward, optimizer, parallel
from her_nemo.stages.sft import sft_objective
from her_nemo.training.learner import global_sums, mean_loss
from her_nemo.training.loop import kind_weights

WEIGHTS = {
    "even": LayerWeights(),
    "uneven": LayerWeights(system_thinking=0.3, role_thinking=1.7, role_action=0.0, speech=0.45),
}
CAPACITY = 40


def samples() -> list[Sample]:
    """Twelve samples of 3 to 31 tokens; one has no prompt (plain text)."""
    draw = np.random.default_rng(5)
    found = []
    for number in range(12):
        length = int(draw.integers(3, 32))
        prompt = 0 if number == 4 else int(draw.integers(1, length))
        kinds = np.where(np.arange(length) < prompt, 0, draw.integers(1, 5, length)).astype(np.int8)
        ids = draw.integers(0, VOCAB, length).astype(np.int32)
        found.append(Sample(f"s{number}", ids, prompt, kinds))
    return found


def batches(packing: bool) -> list[dict]:
    share = {"dp_rank": parallel.data_rank(), "dp_size": parallel.data_size(), "pad_id": 0}
    if packing:
        return packed_micro_batches(samples(), range(12), capacity=CAPACITY, **share)
    return step_micro_batches(samples(), range(12), micro_batch_size=2, **share)


def gradients(model) -> torch.Tensor:
    """Every gradient of this rank, after the reduction; with the distributed optimizer its share of each bucket."""
    buckets = [bucket.grad_data for chunk in model.chunks for buffer in chunk.buffers for bucket in buffer.buckets]
    if model.distributed_optimizer:
        buckets = [data.chunk(parallel.data_size())[parallel.data_rank()] for data in buckets]
    return torch.cat([data.double().clone() for data in buckets])


def step(model, micro_batches: list[dict], loss_fn: Callable) -> tuple[float, torch.Tensor]:
    reports = forward.forward_backward(model, micro_batches, loss_fn)
    return mean_loss(global_sums(reports)), gradients(model)


def packing(args: dict) -> dict:
    """{layout: {weights: {loss, packed_loss, gradient gap, norm, held-out gap, rows}}}."""
    results = {}
    for layout in args["layouts"]:
        start(layout)
        results[layout["name"]] = {}
        for name, weights in WEIGHTS.items():
            model = build(Path(args["directory"]), "tied", layout)
            objective = sft_objective(weights)
            loss, plain = step(model, batches(False), objective)
            packed_loss, packed = step(model, batches(True), objective)
            held_out = [global_sums(forward.evaluate(model, batches(p), objective)) for p in (False, True)]
            norm = optimizer.step(new_optimizer(model), 1)
            results[layout["name"]][name] = {
                "loss": loss,
                "packed_loss": packed_loss,
                "gradients": far(packed, plain),
                "largest": float(plain.abs().max()),
                "norm": norm,
                "by_kind": max(abs(held_out[0][key] - held_out[1][key]) for key in held_out[0]),
                "rows": len(batches(True)),
                "samples": sum(len(b["tokens_BS"]) for b in batches(False)),
            }
    return results


def plain_torch(directory: Path) -> dict:
    """The same loss and gradient norm from transformers, one sample at a time."""
    from transformers import Qwen3ForCausalLM

    found = {}
    for name, weights in WEIGHTS.items():
        model = Qwen3ForCausalLM.from_pretrained(directory / "tied", dtype=torch.float32)
        total = count = torch.zeros(())
        for sample in samples():
            ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
            p = model(ids).logits[0, :-1].log_softmax(-1)
            trained = (torch.arange(1, len(sample)) >= sample.prompt_length).float()[None]
            kinds = torch.from_numpy(sample.kinds)[None, 1:]
            weight = weigh_kinds(trained, kinds, kind_weights(weights))[0]
            total = total - (p.gather(-1, ids[0, 1:, None]).squeeze(-1) * weight).sum()
            count = count + weight.sum()
        loss = total / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        found[name] = {"loss": float(loss.detach()), "norm": float(norm)}
    return found
