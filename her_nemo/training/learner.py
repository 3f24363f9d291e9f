"""A model that learns: the model, its optimizer and its schedule, and the one update that all stages use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from her_nemo.config.sections import OptimConfig, Peft
from her_nemo.megatron import forward, optimizer, parallel, state
from her_nemo.megatron.forward import TokenOutputs
from her_nemo.megatron.qwen3 import Model
from her_nemo.training import source as sources
from her_nemo.training.logging import sum_metrics

MicroBatch = dict[str, torch.Tensor]
# (outputs, micro-batch) -> (sum of the loss, how many things it sums over, further sums to report)
LossFunction = Callable[
    [TokenOutputs, MicroBatch], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
]


class Learner:
    """One trainable model of a stage (`name`: its part of a checkpoint)."""

    def __init__(
        self, name: str, model: Model, optim: OptimConfig, *, clip_grad: float, max_steps: int
    ) -> None:
        self.name = name
        self.model = model
        self.optimizer = optimizer.optimizer(
            model,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            betas=(optim.betas[0], optim.betas[1]),
            clip_grad=clip_grad,
        )
        sched = optim.sched
        self.scheduler = optimizer.scheduler(
            self.optimizer,
            lr=optim.lr,
            name=sched.name,
            warmup_steps=sched.warmup_steps,
            constant_steps=sched.constant_steps,
            min_lr=sched.min_lr,
            max_steps=max_steps,
        )

    @classmethod
    def build(
        cls,
        name: str,
        cfg: Any,
        optim: OptimConfig,
        *,
        source: sources.ModelSource,
        head: str,
        clip_grad: float,
        max_steps: int,
        peft: Peft | None = None,
    ) -> Learner:
        """Build and fill the model as `cfg.model` and `cfg.trainer` say; with `peft`, to train what that says."""
        lora, path = (peft.lora(), peft.restore_from_path) if peft else (None, None)
        model = sources.build(
            source,
            cfg.model,
            cfg.trainer.precision,
            head=head,
            trainable=True,
            distributed_optimizer=optim.name == "distributed_fused_adam",
            lora=lora,
            adapters=sources.locate(path) if lora and path else None,
        )
        return cls(name, model, optim, clip_grad=clip_grad, max_steps=max_steps)

    def update(
        self,
        micro_batches: list[MicroBatch],
        loss_fn: LossFunction,
        *,
        step: int,
        with_entropy: bool = False,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        """One optimizer step on the global batch (collective).

        Returns the global sums that `loss_fn` reported, plus "loss" (mean), "count", "grad_norm" and "lr".

        Raises:
            FloatingPointError: the loss is not finite on some rank; the optimizer has not been touched.
        """
        sums = self.backward(
            micro_batches, loss_fn, step=step, with_entropy=with_entropy, temperature=temperature
        )
        rate = self.scheduler.lr
        grad_norm = optimizer.step(self.optimizer, step)
        self.scheduler.step()
        return {**sums, "grad_norm": grad_norm, "lr": rate}

    def backward(
        self,
        micro_batches: list[MicroBatch],
        loss_fn: LossFunction,
        *,
        step: int,
        with_entropy: bool = False,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        """The gradients of `update` without its optimizer step (collective); the same sums but "grad_norm" and "lr"."""
        rows = forward.forward_backward(
            self.model, micro_batches, loss_fn, with_entropy=with_entropy, temperature=temperature
        )
        totals = global_sums(rows)
        forward.assert_finite(totals["loss_sum"], step)
        return {**totals, "loss": mean_loss(totals)}

    def evaluate(self, micro_batches: list[MicroBatch], loss_fn: LossFunction) -> dict[str, float]:
        """The same sums without gradients."""
        totals = global_sums(forward.evaluate(self.model, micro_batches, loss_fn))
        return {**totals, "loss": mean_loss(totals)}

    def save(self, directory: Path) -> None:
        state.save(directory / self.name, self.model, self.optimizer, self.scheduler)

    def load(self, directory: Path) -> None:
        state.load(directory / self.name, self.model, self.optimizer, self.scheduler)


def mean_loss(totals: dict[str, float]) -> float:
    """The loss per token; 0 for a batch in which no token has a weight (it gives no gradient either)."""
    return totals["loss_sum"] / totals["count"] if totals["count"] else 0.0


def global_sums(rows: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Sums over micro-batches and data-parallel replicas, the same on every rank (collective)."""
    total = sum_metrics(rows)
    names = sorted(total)
    stacked = parallel.data_all_reduce(torch.stack([total[name] for name in names]))
    return dict(zip(names, stacked.tolist(), strict=True))
