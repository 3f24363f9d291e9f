"""The reward model: Bradley-Terry on preference pairs, from a language model with a scalar head.

Bradley & Terry 1952; Stiennon et al. 2020 (arXiv 2009.01325). The score of a reply is the head's value at the
reply's last token, wherever padding begins. A micro-batch holds B chosen rows, then their B rejected ones.
"""

from __future__ import annotations

import torch

from her_nemo.algorithms.ranking_loss import bradley_terry
from her_nemo.config.schema import RewardConfig
from her_nemo.data.loaders import GlobalBatchSampler, collate, pad_length, split_rows
from her_nemo.data.tokenise import Sample, Tokeniser, load_pairs
from her_nemo.megatron import parallel
from her_nemo.megatron.forward import TokenOutputs
from her_nemo.training.learner import Learner, MicroBatch
from her_nemo.training.run import open_run, total_steps

Pair = tuple[Sample, Sample]


def run(cfg: RewardConfig) -> int:
    loop = cfg.trainer.rm
    with open_run(cfg) as here:
        tokeniser = Tokeniser(here.tokenizer)
        train = load_pairs(tokeniser, cfg.model.data.train_ds.file_path, cfg.model)
        valid_path = cfg.model.data.validation_ds.file_path
        valid = load_pairs(tokeniser, valid_path, cfg.model) if valid_path else []
        order = GlobalBatchSampler(
            len(train), cfg.model.global_batch_size, seed=cfg.model.seed, shuffle=cfg.model.data.shuffle
        )
        last = total_steps(loop, len(order))
        learner = Learner.build(
            "model", cfg, cfg.model.optim, source=here.source, head="scalar", clip_grad=loop.gradient_clip_val,
            max_steps=last,
        )
        done = here.resume([learner], order)
        batches = iter(order)
        summary = {}
        for step in here.steps(done + 1, last, "reward"):
            batch = to_micro_batches([train[i] for i in next(batches)], cfg, tokeniser)
            sums = learner.update(batch, ranking_loss, step=step)
            here.metrics.log(step, tags("train", sums) | {"train/grad_norm": sums["grad_norm"], "train/lr": sums["lr"]})
            if valid and (step % loop.val_check_interval == 0 or step == last):
                held_out = validate(learner, valid, cfg, tokeniser)
                here.metrics.log(step, tags("val", held_out))
                summary = {"heldout_accuracy": held_out["accuracy"], "heldout_pairs": held_out["count"]}
            if step % loop.save_interval == 0 or step == last:
                here.save(step)
        here.finish({"steps": last, "train_pairs": len(train), **summary})
    return 0
