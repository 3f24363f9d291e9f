"""Our Megatron models behind NeMo-Aligner's alignable interfaces.

NeMo-Aligner's trainers are agnostic of the model: they call these methods, clip, step the optimizer and log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface, SupervisedInterface

from her_nemo.config.schema import ModelConfig, PpoModel
from her_nemo.data.tokenise import Prompt, Tokeniser
from her_nemo.megatron import forward, optimizer
from her_nemo.megatron.qwen3 import Model
from her_nemo.rollout.experience import Experience
from her_nemo.training.learner import Learner, LossFunction, MicroBatch

Sums = dict[str, float]


class AlignableOptimizer:
    """A learner's optimizer with the methods the trainers call, in their order: zero_grad, (backward), clip, step."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._norm: float | None = None
        self.grad_norm = 0.0
        """Gradient norm of the last step, before clipping."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._learner.optimizer.param_groups

    @property
    def steps(self) -> int:
        """Updates done, over all runs."""
        return self._learner.scheduler.steps

    def zero_grad(self) -> None:
        """Nothing to do: the backward pass starts from empty gradient buffers."""

    def clip(self, max_norm: float | None = None) -> float:
        """Make the gradients ready and clip them; the norm before. FloatingPointError if it is not finite."""
        self._norm = optimizer.clip(self._learner.optimizer, self.steps + 1, max_norm)
        return self._norm

    def step(self, closure: None = None) -> None:
        """One update. Without a `clip` before (gradient_clip_val=0) the norm is still computed and checked."""
        if self._norm is None:
            self.clip()
        optimizer.apply_clipped(self._learner.optimizer)
        self.grad_norm, self._norm = self._norm or 0.0, None


class _Alignable:
    """What NeMo-Aligner reads of any model, and the hooks that have nothing to do for ours."""

    # So its clip_gradients() calls clip_grad_norm_distributed_optimizer on `_optimizer`, before the step.
    with_megatron_fused_adam = False
    use_mcore_dist_optim = False
    grad_clip_pl_default = False
    with_distributed_adam = True

    def __init__(self, learner: Learner, cfg: ModelConfig) -> None:
        self.learner = learner
        self.cfg = cfg
        self._optimizer = AlignableOptimizer(learner)

    @property
    def optimizer(self) -> AlignableOptimizer:
        return self._optimizer

    # Our models have no dropout, no state between steps and no offloaded optimizer; gradients leave
    # `forward_backward` reduced.
    def prepare_for_training(self) -> None: ...

    def finish_training(self) -> None: ...

    def prepare_for_training_step(self) -> None: ...

    def finish_training_step(self) -> None: ...

    def prepare_for_validation_step(self) -> None: ...

    def finish_validation_step(self) -> None: ...

    def prepare_for_inference(self) -> None: ...

    def finish_inference(self) -> None: ...


class SupervisedModel(_Alignable, SupervisedInterface):
    """SFT and the reward model: a learner with the objective of its stage."""

    def __init__(self, learner: Learner, cfg: ModelConfig, objective: LossFunction) -> None:
        super().__init__(learner, cfg)
        self._objective = objective

    def get_loss_and_metrics(self, batch: list[MicroBatch], forward_only: bool) -> tuple[float, Sums]:
        """Mean loss of one global batch and its global sums, on every rank; gradients unless `forward_only`."""
        if forward_only:
            sums = self.learner.evaluate(batch, self._objective)
        else:
            sums = self.learner.backward(batch, self._objective, step=self._optimizer.steps + 1)
        return sums["loss"], sums


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one whole rollout, and the step that seeds what is drawn for them (0: validation)."""

    prompts: Sequence[Prompt]
    step: int


class ActorModel(_Alignable, AlignableGenerativeInterface):
    """The policy of PPO, with the frozen reference beside it.

    Args:
        generate: (prompts of the whole rollout, step) -> this replica's share of it, by our rollout engine.
        objective: the policy loss.
        on_unmoved: sees the sums of the first minibatch after each rollout, where the ratio must be 1.
    """

    def __init__(
        self,
        learner: Learner,
        cfg: PpoModel,
        reference: Model,
        tokeniser: Tokeniser,
        *,
        generate: Callable[[Sequence[Prompt], int], Experience],
        objective: LossFunction,
        on_unmoved: Callable[[Sums], None],
    ) -> None:
        super().__init__(learner, cfg)
        self.tokenizer = SimpleNamespace(eos_id=tokeniser.eos_id, ids_to_text=tokeniser.decode)
        self._reference = reference
        self._generate, self._objective, self._on_unmoved = generate, objective, on_unmoved
        self._unmoved = False
        ppo = cfg.ppo
        self._size, self._temperature = ppo.forward_micro_batch_size, ppo.sampling_params.temperature
        self._with_entropy = ppo.entropy_bonus > 0
        self._micro_batch_size = cfg.micro_batch_size

    @torch.no_grad()
    def infer(self, inference_batch: PromptBatch) -> dict[str, torch.Tensor]:
        """Replies to this replica's share of the prompts, padded right.

        response_tokens [B, S] and response_lengths [B] cover prompt and reply, as in NeMo-Aligner; `kinds` and
        `rollout_logprobs` [B, S-1] are ours and travel with them.
        """
        found = self._generate(inference_batch.prompts, inference_batch.step)
        return {
            "response_tokens": found.tokens_BS,
            "response_lengths": found.lengths_B,
            "prompt_lengths": found.lengths_B - found.response_lengths_B,
            "is_end": found.finished_B.float(),
            "kinds": found.kinds_BT,
            "rollout_logprobs": found.rollout_log_probs_BT,
        }

    def get_inference_log_probs(self, response_tokens: torch.Tensor) -> torch.Tensor:
        """[B, S-1] under the present policy, at the temperature of the rollouts."""
        self._unmoved = True
        return self._log_probs(self.learner.model, response_tokens)

    def get_init_policy_logprobs(self, response_tokens: torch.Tensor) -> torch.Tensor:
        """[B, S-1] under the frozen reference."""
        return self._log_probs(self._reference, response_tokens)

    def _log_probs(self, model: Model, tokens_BS: torch.Tensor) -> torch.Tensor:
        batches = token_batches(tokens_BS, self._size)
        return torch.cat(forward.log_probs(model, batches, temperature=self._temperature))

    def get_loss_and_metrics(self, batch: dict[str, torch.Tensor], forward_only: bool) -> tuple[float, Sums]:
        """The clipped policy loss of one minibatch with its gradients; global sums, on every rank."""
        if forward_only:
            raise NotImplementedError("PPOTrainer validates with rollouts, not with the loss")
        rows = {
            "tokens_BS": batch["response_tokens"],
            "old_log_probs_BT": batch["prev_logprobs"],
            "advantages_BT": batch["advantages"],
            "mask_BT": batch["mask"].bool(),
            "kinds_BT": batch["kinds"],
            "scored_B": torch.ones(len(batch["mask"]), dtype=torch.bool, device=batch["mask"].device),
        }
        sums = self.learner.backward(
            micro_batches(rows, self._micro_batch_size),
            self._objective,
            step=self._optimizer.steps + 1,
            with_entropy=self._with_entropy,
            temperature=self._temperature,
        )
        if self._unmoved:
            self._on_unmoved(sums)
            self._unmoved = False
        return sums["loss"], dict(sums)


def micro_batches(rows: dict[str, torch.Tensor], size: int) -> list[MicroBatch]:
    """The rows of every tensor, `size` at a time."""
    count = len(rows["tokens_BS"])
    return [
        {name: value[begin : begin + size] for name, value in rows.items()} for begin in range(0, count, size)
    ]


def token_batches(tokens_BS: torch.Tensor, size: int) -> list[MicroBatch]:
    """Micro-batches of tokens alone, for a forward without a loss."""
    return micro_batches({"tokens_BS": tokens_BS}, size)
