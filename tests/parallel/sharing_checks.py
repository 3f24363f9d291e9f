"""What each process of the test of shared prompts does: the same rows with a row a reply and with prompts shared."""

from __future__ import annotations

from pathlib import Path

import torch
from packing_checks import gradients
from qwen3_checks import build, far, start
from qwen3_reference import VOCAB

from her_nemo.megatron import forward, parallel
from her_nemo.megatron.forward import TokenOutputs
from her_nemo.megatron.shared_prompts import GROUP
from her_nemo.rollout.engine import Sampling
from her_nemo.rollout.megatron_engine import MegatronEngine

LENGTH = 21
# Prompt and the lengths of its replies: uneven ones, even ones, a group of one, a reply of one token.
GROUPS = (((5, (3, 9, 1)), (2, (6, 6, 6))), ((11, (4,)), (3, (8, 2, 2)), (1, (5, 5))))


def rows() -> list[dict]:
    """Two micro-batches of six rows, replies marked, with random weights for a loss; another draw on each replica."""
    draw = torch.Generator().manual_seed(7 + parallel.data_rank())
    batches = []
    for groups in GROUPS:
        tokens, mask, prompts, ends, numbers = [], [], [], [], []
        for number, (prompt, replies) in enumerate(groups):
            first = torch.randint(1, VOCAB, (prompt,), generator=draw)
            for reply in replies:
                drawn = torch.randint(1, VOCAB, (reply,), generator=draw)
                padding = torch.zeros(LENGTH - prompt - reply, dtype=torch.long)
                tokens.append(torch.cat([first, drawn, padding]))
                place = torch.arange(LENGTH - 1)
                mask.append((place >= prompt - 1) & (place < prompt + reply - 1))
                prompts.append(prompt)
                ends.append(prompt + reply)
                numbers.append(number)
        batches.append(
            {
                "tokens_BS": torch.stack(tokens),
                "mask_BT": torch.stack(mask),
                "prompt_lengths_B": torch.tensor(prompts),
                "lengths_B": torch.tensor(ends),
                GROUP: torch.tensor(numbers),
                "weights_BT": torch.randn(len(tokens), LENGTH - 1, generator=draw),
            }
        )
    return batches


def plain(batches: list[dict]) -> list[dict]:
    return [{key: value for key, value in batch.items() if key != GROUP} for batch in batches]


def objective(said: TokenOutputs, batch: dict) -> tuple:
    """Something in which every prediction has a gradient of its own."""
    if said.values_BS is not None:
        per_token = said.values_BS[:, :-1] ** 2
    else:
        per_token = said.log_probs_BT + 0.3 * said.entropy_BT
    loss = (per_token * batch["weights_BT"] * batch["mask_BT"]).sum()
    return loss, batch["mask_BT"].sum(), {"sum": loss}


def masked(name: str, outputs: list[dict], batches: list[dict]) -> torch.Tensor:
    """The numbers of reply tokens; of values also those at the last token."""
    parts = []
    for said, batch in zip(outputs, batches, strict=True):
        if name == "values_BS":
            place = torch.arange(LENGTH)
            here = (place >= batch["prompt_lengths_B"][:, None] - 1) & (place < batch["lengths_B"][:, None])
        else:
            here = batch["mask_BT"]
        parts.append(said[name][here])
    return torch.cat(parts)


def sharing(args: dict) -> dict:
    """{layout: {check: largest difference}} and, as `tokens`, how many tokens each way runs through the layers."""
    results = {}
    for layout in args["layouts"]:
        start(layout)
        found: dict[str, float] = {}
        for model_name in ("tied", "untied", "scalar"):
            model = build(Path(args["directory"]), model_name, layout)
            entropy = {"with_entropy": model.head == "lm"}
            batches = rows()
            alone = forward.outputs(model, plain(batches), **entropy)
            shared = forward.outputs(model, batches, **entropy)
            for name in alone[0]:
                found[f"{model_name}.{name}"] = far(masked(name, shared, batches), masked(name, alone, batches))
                outside = sum(float(part[name].abs().sum()) for part in shared)
                found[f"{model_name}.{name}_outside"] = abs(
                    outside - float(masked(name, shared, batches).abs().sum())
                )
            forward.forward_backward(model, plain(batches), objective, **entropy)
            wanted = gradients(model)
            forward.forward_backward(model, batches, objective, **entropy)
            found[f"{model_name}.gradients"] = far(gradients(model), wanted)
            found[f"{model_name}.least_gradient"] = 1.0 / float(wanted.abs().max())
            if model_name == "tied":
                found |= rollouts(model)
        results[layout["name"]] = found
    return results


def rollouts(model) -> dict[str, float]:
    """Replies drawn with and without a shared prefill."""
    prompts = [[5, 9, 17, 3]] * 3 + [[8]] * 3 + [[2, 4, 6, 8, 10]] * 3
    sampling = Sampling(max_tokens=10, min_tokens=2, stop_ids=(100,))
    alone, shared = (
        MegatronEngine(model, pad_id=0, micro_batch_size=6, share_prompts=share).generate(prompts, sampling, seed=11)
        for share in (False, True)
    )
    pairs = zip(alone.log_probs, shared.log_probs, strict=True)
    gap = max(abs(a - b) for row in pairs for a, b in zip(*row, strict=True))
    return {"replies_differ": float(alone.response_ids != shared.response_ids), "rollout_log_probs": gap}
