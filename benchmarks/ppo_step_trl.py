"""The other side of benchmarks/ppo_step.py: TRL's GRPOTrainer, in an environment of its own.

    python benchmarks/ppo_step_trl.py JOB.json OUT.json

Started by ppo_step.py, which says what is equal. One "step" is one rollout and its updates, from the start of one
generation to the start of the next (the last one: to the end of training). Needs torch, transformers, datasets and trl;
nothing of her_nemo.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


class Clock:
    """Processor seconds of each part of each step, and what was generated."""

    def __init__(self) -> None:
        self.begun: list[tuple[float, float]] = []  # by the clock and by processor time
        self.parts: list[dict[str, float]] = []
        self.prompts: list[list[list[int]]] = []
        self.tokens: list[int] = []

    def timed(self, name: str | Callable[..., str | None], function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its processor seconds added to the part `name` (or what `name` makes of the arguments)."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            part = name if isinstance(name, str) else name(*args)
            begun = time.process_time()
            result = function(*args, **kwargs)
            if part is not None:
                here = self.parts[-1]
                here[part] = here.get(part, 0.0) + time.process_time() - begun
            return result

        return run

    def mark(self) -> None:
        self.begun.append((time.perf_counter(), time.process_time()))

    def steps(self) -> list[dict[str, float]]:
        pairs = zip(self.begun, self.begun[1:], self.parts, strict=False)
        return [
            {"step": end[0] - begin[0], "processor": end[1] - begin[1], **parts} for begin, end, parts in pairs
        ]


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="her_nemo_trl_") as scratch:
        trainer = GRPOTrainer(
            model=job["model"],
            reward_funcs=scorer(job),
            args=arguments(job, scratch),
            train_dataset=Dataset.from_list([{"prompt": row["messages"]} for row in rows(job)]),
            processing_class=tokenizer,
        )
        measure(trainer, clock)
        trainer.train()
        clock.mark()
    packages = ("trl", "transformers", "torch", "accelerate", "datasets", "numpy")
    found = {
        "steps": clock.steps(),
        "prompts": clock.prompts,
        "tokens": clock.tokens,
        "threads": torch.get_num_threads(),
        "dtype": str(trainer.model.dtype),
        "reference_dtype": str(trainer.ref_model.dtype),
        "attention": trainer.model.config._attn_implementation,
        "updates": trainer.state.global_step,
        "versions": {name: version(name) for name in packages},
    }
    Path(sys.argv[2]).write_text(json.dumps(found) + "\n")
    return 0


def rows(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(job["prompts"]).read_text(encoding="utf-8").splitlines()]


def arguments(job: dict[str, Any], scratch: str) -> GRPOConfig:
    """GRPO as conf/algorithm/grpo.yaml has it; everything that would cost time without being asked for is off."""
    per_update = job["samples"] // job["updates"]
    return GRPOConfig(
        output_dir=scratch,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=per_update // job["micro_batch"],
        steps_per_generation=job["samples"] // job["micro_batch"],
        num_generations=job["group"],
        num_iterations=1,
        max_completion_length=job["tokens"],
        generation_kwargs={"min_new_tokens": job["tokens"]},
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=job["beta"],
        epsilon=0.2,
        loss_type="grpo",
        scale_rewards="group",
        shuffle_dataset=False,
        max_steps=job["steps"] * job["updates"],
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.01,
        max_grad_norm=1.0,
        logging_steps=job["updates"],
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )


def scorer(job: dict[str, Any]) -> Callable[..., list[float]]:
    """The reward model over the token ids of prompt and reply: the score at the last token, in micro-batches.

    TRL would decode the replies and encode the text again, which for a random model are other and more tokens.
    """
    network = AutoModelForSequenceClassification.from_pretrained(job["reward"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])

    @torch.inference_mode()
    def score(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        asked = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = [prompt + reply for prompt, reply in zip(asked, completion_ids, strict=True)]
        scores: list[float] = []
        for begin in range(0, len(whole), job["micro_batch"]):
            part = whole[begin : begin + job["micro_batch"]]
            size = max(map(len, part))
            ids = torch.tensor([row + [tokenizer.pad_token_id] * (size - len(row)) for row in part])
            mask = torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in part])
            hidden = network.model(input_ids=ids, attention_mask=mask).last_hidden_state
            last = hidden[torch.arange(len(part)), mask.sum(1) - 1]
            scores += network.score(last)[:, 0].tolist()
        return scores

    return score


def measure(trainer: GRPOTrainer, clock: Clock) -> None:
    """Put clocks on the trainer's own methods."""
    scored = trainer._generate_and_score_completions

    @wraps(scored)
    def begin(inputs: Any) -> Any:
        clock.mark()
        clock.parts.append({})
        return scored(inputs)

    def which(model: Any, *_: Any) -> str | None:
        if torch.is_grad_enabled():
            return None  # part of the update
        return "reference" if model is trainer.ref_model else "policy"

    generated = trainer._generate_single_turn

    @wraps(generated)
    def generate(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        result = generated(prompt_ids, *args, **kwargs)
        clock.prompts.append([list(ids) for ids in prompt_ids])
        clock.tokens.append(sum(len(ids) for ids in result[0]))
        return result

    trainer._generate_and_score_completions = begin
    trainer._generate_single_turn = clock.timed("generate", generate)
    trainer._calculate_rewards = clock.timed("score", trainer._calculate_rewards)
    trainer._get_per_token_logps_and_entropies = clock.timed(which, trainer._get_per_token_logps_and_entropies)


if __name__ == "__main__":
    sys.exit(main())
