"""Supervised fine-tuning: the trained reply of every sample, its loss summed over tokens and divided by their
global count, so that the curve does not depend on micro-batches or on how the model is cut."""

from __future__ import annotations

import torch

from her_nemo.algorithms.masking import weigh_kinds
from her_nemo.algorithms.sft_loss import masked_nll
from her_nemo.config.schema import SftConfig
from her_nemo.config.sections import LayerWeights
from her_nemo.data.tokenise import KIND_NAMES
from her_nemo.megatron.forward import TokenOutputs
from her_nemo.training.learner import LossFunction, MicroBatch
from her_nemo.training.loop import forever, kind_weights, my_micro_batches, set_up, validate
from her_nemo.training.run import open_run


def run(cfg: SftConfig) -> int:
    loop, model = cfg.trainer.sft, cfg.model
    with open_run(cfg) as here:
        made = set_up(cfg, loop, here, kind="sft", head="lm")
        tokeniser, train, valid, learner, last = made.tokeniser, made.train, made.valid, made.learner, made.last
        objective = sft_objective(model.data.layer_weights)
        done = here.resume([learner], made.order)
        if cfg.trainer.backend == "nemo_aligner":
            from her_nemo.aligner import supervised

            stage = supervised.Stage(objective, tags, figures)
            rows = {"train": train, "valid": valid, "tokeniser": tokeniser}
            supervised.fit(here, learner, made.order, loop, stage, done=done, **rows)
            return 0
        batches = forever(made.order)
        for step in here.steps(done + 1, last, "sft"):
            indices = next(batches)
            here.tokens += sum(len(train[index]) for index in indices)
            with here.timers("update"):
                sums = learner.update(
                    my_micro_batches(train, indices, model, tokeniser), objective, step=step
                )
            here.metrics.log(
                step, tags("train", sums) | {"train/grad_norm": sums["grad_norm"], "train/lr": sums["lr"]}
            )
            here.summary |= {"steps": step} | figures("train", sums)
            if valid and (step % loop.val_check_interval == 0 or step == last):
                held_out = validate(learner, valid, model, loop, tokeniser, objective)
                here.metrics.log(step, tags("val", held_out))
                here.summary |= figures("val", held_out)
            if step % loop.save_interval == 0 or step == last:
                here.save(step)
    return 0


def sft_objective(layer_weights: LayerWeights) -> LossFunction:
    """Negative log-likelihood of the trained tokens as a mean weighted by segment kind, and the plain sums of each
    kind for the log."""
    weights_K = kind_weights(layer_weights)

    def objective(
        outputs: TokenOutputs, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        assert outputs.log_probs_BT is not None
        mask_BT, kinds_BT = batch["loss_mask_BT"], batch["kinds_BT"]
        loss_sum, count = masked_nll(outputs.log_probs_BT, weigh_kinds(mask_BT, kinds_BT, weights_K))
        sums = {"tokens": mask_BT.sum()}
        for kind, name in KIND_NAMES.items():
            here = mask_BT * (kinds_BT == kind)
            sums[f"{name}_nll"], sums[f"{name}_tokens"] = masked_nll(outputs.log_probs_BT.detach(), here)
        return loss_sum, count, sums

    return objective


def tags(split: str, sums: dict[str, float]) -> dict[str, float]:
    """TensorBoard tags of one global batch: mean loss per token, in all and by segment kind."""
    found = {f"{split}/loss": sums["loss"], f"{split}/tokens": sums["tokens"]}
    for name in KIND_NAMES.values():
        if sums[f"{name}_tokens"]:
            prefix = f"layers/{name}" if split == "train" else f"{split}_layers/{name}"
            found[f"{prefix}/loss"] = sums[f"{name}_nll"] / sums[f"{name}_tokens"]
            found[f"{prefix}/tokens"] = sums[f"{name}_tokens"]
    return found


def figures(split: str, sums: dict[str, float]) -> dict[str, float]:
    """What of one global batch, or of one validation, goes to summary.json."""
    return {f"{split}_loss": sums["loss"]}
