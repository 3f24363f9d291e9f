"""Sections of reinforcement learning: lengths, the KL penalty, importance weights, the mix of a reward, diversity.

docs/rl.md has the formulas.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from her_nemo.config.base import Section, knob


class KlPenalty(Section):
    """`trainer.ppo.kl.*`: what the KL penalty is made of; its weight is trainer.ppo.initial_policy_kl_penalty."""

    placement: Literal["reward", "loss"] = knob(
        "reward", "reward: taken off each token's reward; loss: added to the loss, with its gradient."
    )
    estimator: Literal["k1", "k2", "k3"] = knob(
        "k1", "k1: log-ratio; k2: half its square; k3: r - 1 - log r. In the loss k2 or k3."
    )
    target: PositiveFloat | None = knob(
        None, "Adaptive penalty: the KL it is led towards, nats a reply; null keeps it fixed."
    )
    horizon: PositiveFloat = knob(10000.0, "Adaptive penalty: replies over which it changes; more is slower.")


class LengthParams(Section):
    """`model.ppo.length_params.*`."""

    max_length: PositiveInt = knob(1024, "Longest response, tokens, the end token included.")
    min_length: NonNegativeInt = knob(1, "Shortest response, tokens.")


class ImportanceSampling(Section):
    """`model.ppo.importance.*`: correction for log-probs of the engine that are not quite the trainer's."""

    correction: Literal["none", "truncate", "mask"] = knob(
        "none", "truncate: weight by min(trainer/engine, high); mask: leave out what is not in [low, high]."
    )
    level: Literal["token", "sequence"] = knob("token", "One weight a token, or one for the whole reply.")
    low: Annotated[float, Field(gt=0.0, le=1.0)] = knob(0.5, "mask: smallest ratio kept.")
    high: Annotated[float, Field(ge=1.0)] = knob(2.0, "Largest weight, or largest ratio kept.")


class RewardMix(Section):
    """`reward.mix.*`: weights of the parts of reward.kind=mix; 0 leaves a part out."""

    scalar: NonNegativeFloat = knob(1.0, "Weight of the scalar reward model.")
    rules: NonNegativeFloat = knob(1.0, "Weight of the rules' sum.")
    generative: NonNegativeFloat = knob(0.0, "Weight of the judge's comparisons.")


class RewardRules(Section):
    """`reward.rules.*`: weights of rules that each give 0 (bad) to 1, for reward.kind=rules and mix."""

    format: NonNegativeFloat = knob(1.0, "1 for a reply without any defect of format, else 0.")
    leak: NonNegativeFloat = knob(1.0, "0 where a hidden thought shows, else 1.")
    length: NonNegativeFloat = knob(0.0, "1 inside [min_words, max_words] visible words, less outside.")
    repetition: NonNegativeFloat = knob(0.0, "1 less the share of 4-grams that stood in the reply before.")
    min_words: PositiveInt = knob(5, "Shortest visible reply without a loss, words.")
    max_words: PositiveInt = knob(120, "Longest visible reply without a loss, words; twice as many get 0.")


class JudgeSource(Section):
    """`reward.generative.judge.*`: who compares replies: a checkpoint in this process, or servers."""

    restore_from_path: str | None = knob(
        None, "A judge's checkpoint, loaded frozen beside the policy: a run's directory, or a Hugging Face directory."
    )
    servers: list[str] = knob(
        [], "OpenAI-compatible servers in place of a checkpoint, as http://HOST:8000/v1."
    )
    model: str | None = knob(None, "With servers: the judge's name there.")
    api_key_env: str | None = knob(None, "With servers: the environment variable that holds the key; null sends none.")
    structured_output: bool = knob(True, "With servers: hold the answer to the verdict's JSON schema.")
    concurrency: PositiveInt = knob(32, "With servers: requests that a replica has under way, for each server.")
    timeout_seconds: PositiveFloat = knob(300.0, "With servers: longest wait for one answer.")
    retries: NonNegativeInt = knob(
        4, "With servers: further attempts at a request that failed, on another server where there is one."
    )
    brief: bool = knob(False, "Ask in one line, for a judge that was trained so; else with HER's instructions.")
    temperature: NonNegativeFloat = knob(0.0, "0 is greedy: the same question has the same answer.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = knob(1.0, "Nucleus sampling of the verdict; 1 turns it off.")
    max_tokens: PositiveInt = knob(1024, "Longest verdict, tokens, its reasoning included.")
    micro_batch_size: PositiveInt = knob(16, "With a checkpoint: verdicts generated together on one replica.")


class Generative(Section):
    """`reward.generative.*`: replies compared pairwise by a judge, for reward.kind=generative and mix."""

    against: Literal["sft", "reference", "group"] = knob(
        "sft",
        "What a reply is compared with: the frozen start's reply; a reply of the data; the others to its prompt.",
    )
    replies: str | None = knob(
        None,
        "The replies to compare with, in a file of SFT rows (messages that end with the reply). reference needs it; "
        "with sft null generates them.",
    )
    judge: JudgeSource = JudgeSource()
    max_unparsed: Annotated[float, Field(ge=0.0, le=1.0)] = knob(
        0.2, "Share of a rollout's verdicts that may be unreadable; with more the run stops."
    )
    cache_dir: str | None = knob(
        None, "A directory where verdicts are kept, for other runs too; null keeps them in memory."
    )


class RewardVerdict(Section):
    """`reward.verdict.*`: what a judge in training earns, for reward.kind=verdict (docs/judge.md)."""

    correct: NonNegativeFloat = knob(1.0, "For a verdict that agrees with the label of its row.")
    valid: NonNegativeFloat = knob(0.2, "For a verdict that can be read.")


class Diversity(Section):
    """`reward.diversity.*`: a reward for differing inside a group, and a watch over the last replies."""

    pattern_weight: NonNegativeFloat = knob(
        0.0, "Weight of the share of other replies to the prompt that are built in another order."
    )
    text_weight: NonNegativeFloat = knob(0.0, "Weight of 1 - BLEU against the other replies to the prompt.")
    window: NonNegativeInt = knob(0, "Replies watched, the newest of the run; 0 turns the watch off.")
    max_top1_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = knob(
        None, "Collapsed: one pattern has more than this share of the window."
    )
    min_pattern_entropy: NonNegativeFloat | None = knob(
        None, "Collapsed: the patterns of the window have less entropy than this, bits."
    )
    patience: PositiveInt = knob(3, "Rollouts in a row beyond a limit before the policy counts as collapsed.")
    action: Literal["alert", "stop"] = knob(
        "alert", "What a collapse does: alert says and logs it; stop also saves and ends the run."
    )

    @property
    def rewarded(self) -> bool:
        """Whether differing is part of the reward."""
        return self.pattern_weight > 0 or self.text_weight > 0


class DialogueSimulator(Section):
    """`model.ppo.dialogue.simulator.*`: who plays the other character."""

    kind: Literal["script", "openai"] = knob(
        "script", "script: the lines of dialogue.scenes; openai: a model behind an OpenAI-compatible server (vLLM)."
    )
    servers: list[str] = knob(
        [], "openai: base URLs, as http://HOST:8000/v1; conversations are dealt out over them, and moved if one dies."
    )
    model: str | None = knob(None, "openai: the model's name at the servers.")
    api_key_env: str | None = knob(None, "openai: environment variable that holds the key; null sends none.")
    temperature: NonNegativeFloat = knob(1.0, "openai: softmax temperature of its turns; 0 is greedy.")
    max_tokens: PositiveInt = knob(
        256, "Longest turn of the simulator, tokens; a longer one is cut."
    )
    attempts: PositiveInt = knob(
        3, "openai: times a turn is asked for before one without speech and action stands as a silence."
    )
    concurrency: PositiveInt = knob(64, "openai: requests under way at a time at each server, by each replica.")
    timeout_seconds: PositiveFloat = knob(120.0, "openai: longest wait for one turn.")
    retries: NonNegativeInt = knob(3, "openai: retries of a request before its server counts as lost.")


class Dialogue(Section):
    """`model.ppo.dialogue.*`: conversations with a simulator in place of single replies (docs/rollouts.md)."""

    turns: PositiveInt = knob(1, "Turns of the policy in each conversation, each a sample; 1: no simulator.")
    credit: Literal["conversation", "last", "to_go", "turn"] = knob(
        "conversation",
        "What a turn's reward is: conversation: the mean score of all its turns; last: the score of the last one; "
        "to_go: its own and later ones, discounted; turn: its own.",
    )
    discount: Annotated[float, Field(ge=0.0, le=1.0)] = knob(1.0, "credit=to_go: discount of later scores, per turn.")
    scenes: list[str] = knob(
        [], "JSON lines by trace_id: who the simulator plays and what it is told or says; empty: from the prompts."
    )
    simulator: DialogueSimulator = DialogueSimulator()

    @property
    def on(self) -> bool:
        """Whether conversations are generated."""
        return self.turns > 1
