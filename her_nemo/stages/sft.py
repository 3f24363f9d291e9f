"""Supervised fine-tuning: the trained reply of every sample, its loss summed over tokens and divided by their
global count, so that the curve does not depend on micro-batches or on how the model is cut."""

from __future__ import annotations

import torch

from her_nemo.algorithms.sft_loss import masked_nll
from her_nemo.config.schema import SftConfig
from her_nemo.data.loaders import GlobalBatchSampler, collate, micro_batches
from her_nemo.data.tokenise import KIND_NAMES, Sample, Tokeniser, load_samples
from her_nemo.megatron import parallel, platform
from her_nemo.megatron.forward import TokenOutputs
from her_nemo.training.learner import Learner, MicroBatch
from her_nemo.training.run import Run, open_run


def run(cfg: SftConfig) -> int:
    loop = cfg.trainer.sft
    with open_run(cfg) as here:
        tokeniser = Tokeniser(here.tokenizer)
        train = load_samples(tokeniser, cfg.model.data.train_ds.file_path, cfg.model, title="train", verbose=here.main)
        valid_path = cfg.model.data.validation_ds.file_path
        valid = load_samples(tokeniser, valid_path, cfg.model, title="val", verbose=here.main) if valid_path else []
        order = GlobalBatchSampler(
            len(train), cfg.model.global_batch_size, seed=cfg.model.seed, shuffle=cfg.model.data.shuffle
        )
        last = total_steps(loop.max_steps, loop.max_epochs, len(order))
        learner = Learner.build(
            "model", cfg, cfg.model.optim, source=here.source, head="lm", clip_grad=loop.gradient_clip_val,
            max_steps=last,
        )
        done = here.resume([learner], order)
        batches = iter(order)
        for step in here.steps(done + 1, last, "sft"):
            batch = to_micro_batches([train[i] for i in next(batches)], cfg, tokeniser)
            sums = learner.update(batch, sft_loss, step=step)
            here.metrics.log(step, training_tags(sums))
            if valid and (step % loop.val_check_interval == 0 or step == last):
                here.metrics.log(step, validation_tags(validate(learner, valid, cfg, tokeniser)))
            if step % loop.save_interval == 0 or step == last:
                here.save(step)
        here.finish({"steps": last, "train_loss": sums["loss"]})
    return 0


def sft_loss(outputs: TokenOutputs, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Negative log-likelihood of the trained tokens, and the same by segment kind for the log."""
    loss_sum, count = masked_nll(outputs.log_probs_BT, batch["loss_mask_BT"])
    sums = {}
    for kind, name in KIND_NAMES.items():
        here = batch["loss_mask_BT"] * (batch["kinds_BT"] == kind)
        sums[f"{name}_nll"], sums[f"{name}_tokens"] = masked_nll(outputs.log_probs_BT.detach(), here)
    return loss_sum, count, sums
