"""The reward model: Bradley-Terry on preference pairs, from a language model with a scalar head.

Bradley & Terry 1952; Stiennon et al. 2020 (arXiv 2009.01325). The score of a reply is the head's value at the
reply's last token, wherever padding begins. Row 2i of a micro-batch is the chosen reply of pair i, row 2i + 1
the rejected one.
"""

from __future__ import annotations

import torch

from her_nemo.algorithms.ranking_loss import bradley_terry
from her_nemo.config.schema import RewardConfig
from her_nemo.megatron.forward import TokenOutputs
from her_nemo.rewards.scalar import score_at_last_token
from her_nemo.training.learner import MicroBatch
from her_nemo.training.loop import forever, my_micro_batches, set_up, validate
from her_nemo.training.run import open_run


def run(cfg: RewardConfig) -> int:
    loop, model = cfg.trainer.rm, cfg.model
    with open_run(cfg) as here:
        made = set_up(cfg, loop, here, kind="pairs", head="scalar")
        tokeniser, train, valid, learner, last = made.tokeniser, made.train, made.valid, made.learner, made.last
        done = here.resume([learner], made.order)
        here.summary["train_pairs"] = len(train)
        if cfg.trainer.backend == "nemo_aligner":
            from her_nemo.aligner import supervised

            stage = supervised.Stage(pair_loss, tags, figures)
            rows = {"train": train, "valid": valid, "tokeniser": tokeniser}
            supervised.fit(here, learner, made.order, loop, stage, done=done, **rows)
            return 0
        batches = forever(made.order)
        for step in here.steps(done + 1, last, "reward"):
            indices = next(batches)
            here.tokens += sum(len(sample) for index in indices for sample in train[index])
            with here.timers("update"):
                sums = learner.update(
                    my_micro_batches(train, indices, model, tokeniser), pair_loss, step=step
                )
            here.metrics.log(
                step, tags("train", sums) | {"train/grad_norm": sums["grad_norm"], "train/lr": sums["lr"]}
            )
            here.summary |= {"steps": step} | figures("train", sums)
            if valid and (step % loop.val_check_interval == 0 or step == last):
                held_out = validate(learner, valid, model, loop, tokeniser, pair_loss)
                here.metrics.log(step, tags("val", held_out))
                here.summary |= figures("val", held_out)
            if step % loop.save_interval == 0 or step == last:
                here.save(step)
    return 0


def pair_loss(
    outputs: TokenOutputs, batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """-log sigmoid(chosen - rejected) summed over pairs; counts pairs."""
    assert outputs.values_BS is not None
    scores = score_at_last_token(outputs.values_BS, batch["lengths_B"])
    chosen, rejected = scores[0::2], scores[1::2]
    loss_sum, count, correct = bradley_terry(chosen, rejected)
    return loss_sum, count, {"correct": correct, "margin": (chosen - rejected).sum(), "score": scores.sum()}


def tags(split: str, sums: dict[str, float]) -> dict[str, float]:
    """TensorBoard tags of one global batch of pairs."""
    pairs = sums["count"]
    return {
        f"{split}/loss": sums["loss"],
        f"{split}/accuracy": sums["correct"] / pairs,
        f"{split}/margin": sums["margin"] / pairs,
        f"{split}/score_mean": sums["score"] / (2 * pairs),
    }


def figures(split: str, sums: dict[str, float]) -> dict[str, float]:
    """What of one global batch of pairs, or of one validation, goes to summary.json."""
    if split == "train":
        return {"train_loss": sums["loss"]}
    return {
        "heldout_accuracy": sums["correct"] / sums["count"],
        "heldout_pairs": int(sums["count"]),
        "heldout_loss": sums["loss"],
    }
