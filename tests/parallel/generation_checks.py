"""What each process of a generation test does: sample with the Megatron engine and compare with Hugging Face."""

from __future__ import annotations

from pathlib import Path

import torch
from qwen3_checks import build, start

from her_nemo.megatron import forward
from her_nemo.rollout.engine import Rollout, Sampling
from her_nemo.rollout.megatron_engine import MegatronEngine

PROMPTS = [[5, 9, 17, 3], [8], [2, 4, 6, 8, 10, 12, 14], [99, 1, 50], [7, 7]]
STOP = 100


def layouts(args: dict) -> dict:
    """At every layout: greedy and sampled replies, and how far the engine's log-probs are from the trainer's."""
    results = {}
    for layout in args["layouts"]:
        start(layout)
        model = build(Path(args["directory"]), args["model"], layout, trainable=False)
        engine = MegatronEngine(model, pad_id=0, micro_batch_size=2)
        engine.update_weights(iter(()), version=3)
        sampling = Sampling(temperature=0.9, max_tokens=12, stop_ids=(STOP,))
        greedy = engine.generate(PROMPTS, Sampling(temperature=0.0, max_tokens=12, stop_ids=(STOP,)), seed=0)
        drawn = engine.generate(PROMPTS, sampling, seed=11)
        # As two replicas would share the prompts.
        halves = [engine.generate(PROMPTS[first::2], sampling, 11, indices=range(first, 5, 2)) for first in (0, 1)]
        whole = MegatronEngine(model, pad_id=0, micro_batch_size=64)
        again = whole.generate(PROMPTS, sampling, seed=11)
        results[layout["name"]] = {
            "greedy": greedy.response_ids,
            "sampled": drawn.response_ids,
            "same_in_one_batch": drawn.response_ids == again.response_ids,
            "same_in_two_halves": [half.response_ids for half in halves]
            == [drawn.response_ids[first::2] for first in (0, 1)],
            "version": drawn.weight_version,
            "gap": max(trainer_gap(model, greedy, 1.0), trainer_gap(model, drawn, 0.9)),
            "sequence_parallel": model.bare().config.sequence_parallel,
        }
    return results


def trainer_gap(model, rollout: Rollout, temperature: float) -> float:
    """Largest |engine - training forward| over all drawn tokens."""
    worst = 0.0
    for prompt, reply, said in zip(rollout.prompt_ids, rollout.response_ids, rollout.log_probs, strict=True):
        tokens = torch.tensor([prompt + reply])
        found = forward.log_probs(model, [{"tokens_BS": tokens}], temperature=temperature)[0][0, len(prompt) - 1 :]
        worst = max(worst, float((found.cpu().double() - torch.tensor(said, dtype=torch.float64)).abs().max()))
    return worst
