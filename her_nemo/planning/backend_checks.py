"""What `trainer.backend=nemo_aligner` asks of a configuration and of this machine. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from her_nemo.config.errors import Problem
from her_nemo.config.schema import PpoConfig, RewardConfig, SftConfig
from her_nemo.config.sections import Loop, PpoLoop, Section

KEY = "trainer.backend"
PACKAGES = ("nemo_aligner", "nemo")

# What of these sections reaches NeMo-Aligner's PPOTrainer and the models under it; any other key must be left alone.
PPO_KEYS = {
    "trainer.ppo": (
        "max_steps critic_warmup_steps max_epochs val_check_interval save_interval gradient_clip_val "
        "initial_policy_kl_penalty discount_factor gae_lambda normalize_advantages rollout_batch_seq_length"
    ),
    "model.ppo": (
        "num_rollout_samples rollout_micro_batch_size forward_micro_batch_size num_val_samples entropy_bonus ratio_eps "
        "sampling_params length_params"
    ),
    "reward": "restore_from_path",
}


def check(config: SftConfig | RewardConfig | PpoConfig) -> Iterator[Problem]:
    """Everything in which NeMo-Aligner's trainers are stricter than our loops, and whether they are installed."""
    if config.trainer.backend != "nemo_aligner":
        return
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        hint = "run `make setup-nemo`, then .venv-nemo/bin/her-nemo in place of her-nemo; or set trainer.backend=native"
        yield Problem(KEY, f"nemo_aligner, but {' and '.join(missing)} cannot be imported here", hint=hint)
    section, loop = _loop(config)
    if config.model.data.validation_ds.file_path is not None and loop.save_interval % loop.val_check_interval:
        text = f"{loop.save_interval} is not a multiple of val_check_interval = {loop.val_check_interval}"
        above = -(-loop.save_interval // loop.val_check_interval) * loop.val_check_interval
        hint = f"use {section}.save_interval={above}: NeMo-Aligner validates whenever it saves"
        yield Problem(f"{section}.save_interval", text, hint=hint)
    if isinstance(config, PpoConfig):
        yield from _ppo(config)


def _loop(config: SftConfig | RewardConfig | PpoConfig) -> tuple[str, Loop | PpoLoop]:
    if isinstance(config, SftConfig):
        return "trainer.sft", config.trainer.sft
    if isinstance(config, RewardConfig):
        return "trainer.rm", config.trainer.rm
    return "trainer.ppo", config.trainer.ppo


def _ppo(config: PpoConfig) -> Iterator[Problem]:
    if config.trainer.ppo.max_epochs != 1:
        text = f"{config.trainer.ppo.max_epochs}, but NeMo-Aligner's PPOTrainer goes over each rollout once"
        yield Problem("trainer.ppo.max_epochs", text, hint=f"use 1, or {KEY}=native")
    if set(config.model.data.layer_weights.model_dump().values()) != {1.0}:
        text = "NeMo-Aligner's KL penalty does not know segment kinds"
        yield Problem("model.data.layer_weights", text, hint=f"leave them at 1, or {KEY}=native")
    sections = {"trainer.ppo": config.trainer.ppo, "model.ppo": config.model.ppo, "reward": config.reward}
    for name, section in sections.items():
        yield from _unknown(name, section, PPO_KEYS[name].split())


def _unknown(name: str, section: Section, known: list[str]) -> Iterator[Problem]:
    """Keys of our own loop that are set: under NeMo-Aligner's they would have no effect."""
    for key, info in type(section).model_fields.items():
        if key not in known and getattr(section, key) != info.get_default(call_default_factory=True):
            text = "given, but NeMo-Aligner's PPOTrainer does not know it"
            yield Problem(f"{name}.{key}", text, hint=f"leave it out, or {KEY}=native")
