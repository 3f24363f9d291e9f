"""What a PPO run carries from step to step beside its models: moments of rewards, the KL coefficient, the last replies.

It is saved in the manifest of each checkpoint, and a resumed run goes on from it bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.config.schema import PpoConfig
from her_nemo.rewards.diversity import CollapseRule, DiversityMonitor
from her_nemo.training.run import Run
from her_nemo.training.running import KlController, RunningMoments


class PpoState:
    """The same on every rank."""

    def __init__(self, cfg: PpoConfig) -> None:
        ppo, diversity = cfg.trainer.ppo, cfg.reward.diversity
        self.rewards = RunningMoments()
        self.kl = KlController(ppo.initial_policy_kl_penalty, ppo.kl.target, ppo.kl.horizon)
        self.variety: DiversityMonitor | None = None
        if diversity.window:
            limits = CollapseRule(diversity.max_top1_share, diversity.min_pattern_entropy, diversity.patience)
            self.variety = DiversityMonitor(diversity.window, limits)

    def state_dict(self) -> dict[str, Any]:
        state = {"rewards": self.rewards.state_dict(), "kl": self.kl.state_dict()}
        return state | ({} if self.variety is None else {"variety": self.variety.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What the checkpoint does not have (it was not on then) begins anew."""
        if "rewards" in state:
            self.rewards.load_state_dict(state["rewards"])
        if "kl" in state:
            self.kl.load_state_dict(state["kl"])
        if self.variety is not None and "variety" in state:
            self.variety.load_state_dict(state["variety"])


def watch_variety(cfg: PpoConfig, here: Run, step: int, state: PpoState, texts: Sequence[str]) -> bool:
    """Take in a rollout's replies (all replicas', in the order of their prompts) and log how varied the window is.

    Returns whether the policy has collapsed and the run is to stop; says so where it is only to be told.
    """
    seen = state.variety
    if seen is None:
        return False
    seen.add(texts)
    if here.main:
        tags = {
            "roleplay/window_pattern_entropy": seen.pattern_entropy,
            "roleplay/window_top1_pattern_share": seen.top1_share,
            "roleplay/window_self_bleu": seen.self_bleu(),
            "roleplay/collapsed": float(seen.collapsed),
        }
        here.metrics.log(step, tags)
        if seen.collapsed:
            print(f"step {step}: the policy has collapsed: {seen.describe()}", flush=True)
    here.summary["collapsed"] = seen.collapsed or here.summary.get("collapsed", False)
    return seen.collapsed and cfg.reward.diversity.action == "stop"


def stop_collapsed(here: Run, step: int, state: PpoState) -> None:
    """Save and end the run (collective).

    Raises:
        UserError: always.
    """
    here.save(step)
    assert state.variety is not None
    raise UserError(
        f"step {step}: stopped, for the policy has collapsed: {state.variety.describe()}. The checkpoint of this "
        "step is written; go on from an earlier one with reward.diversity.pattern_weight or model.ppo.entropy_bonus "
        "raised, or set reward.diversity.action=alert."
    )
