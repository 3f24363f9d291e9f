"""Steps of one run in a process of its own, so that it can go on elsewhere: `continued.py HF OUT STEPS [CHECKPOINT]`.

Prints the losses as JSON. Whether this is a CPU or a GPU is for CUDA_VISIBLE_DEVICES to say.
"""

from __future__ import annotations

import json
import sys

import torch

from her_nemo.megatron import forward, optimizer, parallel, platform, qwen3, state, weights
from her_nemo.megatron.qwen3 import Qwen3Shape


def main(source: str, out: str, steps: int, begin: str | None) -> dict[str, object]:
    parallel.initialize(seed=5)
    shape = Qwen3Shape.from_hf_dir(source)
    model = qwen3.build(shape, dtype="32", distributed_optimizer=True)
    weights.load_hf(model, source)
    opt = optimizer.optimizer(model, lr=1e-3)
    schedule = optimizer.scheduler(opt, lr=1e-3, warmup_steps=2)
    done = 0
    if begin is not None:
        done = state.load(begin, model, opt, schedule)["done"]

    def nll(said: forward.TokenOutputs, _: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict]:
        return -said.log_probs_BT.sum(), torch.tensor(said.log_probs_BT.numel()), {}

    losses = []
    for step in range(done, done + steps):
        generator = torch.Generator().manual_seed(step)
        batch = {"tokens_BS": torch.randint(0, shape.vocab_size, (4, 32), generator=generator)}
        report = forward.forward_backward(model, [batch], nll)[0]
        losses.append(float(report["loss_sum"] / report["count"]))
        optimizer.step(opt, step)
        schedule.step()
    state.save(out, model, opt, schedule, extra={"done": done + steps})
    parallel.destroy()
    return {"device": platform.device().type, "losses": losses}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None)))
