"""megatron-core's optimizer over this rank's part of the model, one guarded step, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from her_nemo.config.errors import UserError
from her_nemo.megatron import platform
from her_nemo.megatron.qwen3 import Model

Schedule = Literal["constant", "CosineAnnealing"]


def optimizer(
    model: Model,
    *,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    clip_grad: float = 1.0,
    distributed: bool | None = None,
) -> MegatronOptimizer:
    """AdamW (fp32 main parameters and states) with clipping by the global gradient norm; 0 clips nothing.

    Weight decay is not applied to one-dimensional parameters (norms). Whether states are spread over the
    data-parallel ranks was decided in `build(distributed_optimizer=...)`, where gradients get their layout;
    `distributed`, if given, must agree.
    """
    if not model.trainable:
        raise ValueError("an optimizer needs a model built with trainable=True")
    if distributed is not None and distributed != model.distributed_optimizer:
        raise ValueError(f"optimizer(distributed={distributed}) on a model built for {model.distributed_optimizer}")
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=0.0,
        weight_decay=weight_decay,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_eps=eps,
        # An infinite limit clips nothing and still yields the norm.
        clip_grad=clip_grad if clip_grad > 0 else math.inf,
        use_distributed_optimizer=model.distributed_optimizer,
        **model.precision.optimizer_fields(),
    )
    platform.resumable_adam()
    made = get_megatron_optimizer(config, model.chunks, use_gloo_process_groups=False)
    for group in made.param_groups:
        # The optimizer multiplies this in only through megatron's own scheduler, which is not used here.
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
    return made


@torch.no_grad()
def clip(optimizer: MegatronOptimizer, step_number: int, max_norm: float | None = None) -> float:
    """The first half of `step`: gradients made ready and clipped, to the configured norm unless another is given.

    Returns the norm before clipping. Raises FloatingPointError on every rank if it is not finite.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.clip_grad_norm(optimizer.config.clip_grad if max_norm is None else max_norm))
    if not math.isfinite(norm):
        raise FloatingPointError(f"step {step_number}: the gradient norm is {norm}. Stopped before the update.")
    return norm


@torch.no_grad()
def apply_clipped(optimizer: MegatronOptimizer) -> None:
    """The second half of `step`: one update with gradients that `clip` has made ready."""
    optimizer.step_with_ready_grads()


def step(optimizer: MegatronOptimizer, step_number: int) -> float:
    """Clip, check and apply one update; returns the gradient norm before clipping.

    Raises FloatingPointError on every rank, before any parameter changes, if the norm is not finite.
    """
    norm = clip(optimizer, step_number)
    apply_clipped(optimizer)
    return norm


class Scheduler:
    """The learning rate as a function of the number of updates done, written into every parameter group.

    Warm-up is linear, lr * (n + 1) / (warmup_steps + 1), so the first update already moves. "constant" then stays;
    "CosineAnnealing" falls to `min_lr` over max_steps - warmup_steps - constant_steps updates and stays there.
    """

    def __init__(
        self,
        optimizer: MegatronOptimizer,
        *,
        lr: float,
        name: Schedule = "constant",
        warmup_steps: int = 0,
        constant_steps: int = 0,
        min_lr: float = 0.0,
        max_steps: int = -1,
    ) -> None:
        if name not in ("constant", "CosineAnnealing"):
            raise UserError(f"model.optim.sched.name={name!r} is not one of constant, CosineAnnealing")
        if name == "CosineAnnealing" and max_steps <= warmup_steps + constant_steps:
            raise UserError(
                f"CosineAnnealing needs more steps than warmup_steps={warmup_steps} + "
                f"constant_steps={constant_steps}; this run has {max_steps}"
            )
        self._optimizer = optimizer
        self._lr, self._min_lr, self._name = lr, min_lr, name
        self._warmup = warmup_steps
        self._decay_end = max_steps - constant_steps
        self.steps = 0
        self._write()

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.lr_at(self.steps)

    def lr_at(self, steps: int) -> float:
        """The learning rate after `steps` updates."""
        if steps < self._warmup:
            return self._lr * (steps + 1) / (self._warmup + 1)
        if self._name == "constant":
            return self._lr
        progress = min(1.0, (steps - self._warmup) / (self._decay_end - self._warmup))
        return self._min_lr + (self._lr - self._min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def step(self) -> None:
        """Count one update and set the rate of the next."""
        self.steps += 1
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """The number of updates done; the shape of the schedule comes from the config."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `state["steps"]` updates."""
        self.steps = int(state["steps"])
        self._write()

    def _write(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr


def scheduler(optimizer: MegatronOptimizer, **kwargs: Any) -> Scheduler:
    """`Scheduler(optimizer, ...)`, under the name the other rooms know."""
    return Scheduler(optimizer, **kwargs)
