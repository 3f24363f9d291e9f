"""The keys of `her-nemo evaluate benchmark=roleplay_bench` and of `her-nemo evaluate compare`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from her_nemo.config.base import knob, required
from her_nemo.config.evaluation import BenchmarkConfig, ChatModel, ChatSampling, JudgeModel
from her_nemo.config.sections import Fraction, StageConfig

Form = Literal["her", "her_natural", "her_structured", "coser", "card"]


class RoleplayBenchConfig(BenchmarkConfig):
    """`her-nemo evaluate benchmark=roleplay_bench`: MiniMax's Role-Play Bench."""

    seeds: str | list[str] = required("Seeds of the benchmark: JSON lines or Parquet, one file or several.")
    num_seeds: Annotated[int, Field(ge=-1)] = knob(
        -1, "Seeds to take from the head of each file; -1 takes all."
    )
    actor: ChatModel = ChatModel(sampling=ChatSampling(temperature=0.7, top_p=0.95, max_tokens=1024, seed=0))
    user: ChatModel = ChatModel(sampling=ChatSampling(temperature=0.9, top_p=0.95, max_tokens=256, seed=0))
    judge: JudgeModel = JudgeModel()
    actor_form: Form = knob(
        "her",
        "How the actor is prompted: one of our layouts, or card: a plain card with *actions* for any chat model.",
    )
    actor_history: PositiveInt | None = knob(
        None, "Turns of the dialogue that the actor and the user simulator are shown; null shows all."
    )
    user_attempts: PositiveInt = knob(
        3, "Answers asked of the user simulator before a session counts as failed."
    )
    turns: PositiveInt = knob(
        100, "Turns played after the given ones, the simulator's and the actor's together."
    )
    chunk_turns: PositiveInt = knob(20, "Turns that the judge reads at a time.")
    context_turns: NonNegativeInt = knob(20, "Turns before them that it is shown, not judged.")
    prompts_dir: str | None = knob(
        None,
        "Directory of prompts of your own (docs/evaluation.md); a name that is not there is the packaged one.",
    )
    runs: PositiveInt = knob(3, "Sessions a seed, each with draws of its own.")


class CompareConfig(StageConfig):
    """`her-nemo evaluate compare RUN_A RUN_B ...`: results of one benchmark side by side on one HTML page."""

    runs: list[str] = required("Directories with results.json and scenes.jsonl; the first is compared with.")
    out: str = required("The HTML file to write.")
    labels: list[str] = knob(
        [], "What the runs are called on the page, in their order; empty takes it from the paths."
    )
    max_scenes: NonNegativeInt = knob(40, "Scenes to show, those with the largest differences.")
    resamples: PositiveInt = knob(10_000, "Bootstrap resamples of the differences.")
    level: Annotated[float, Field(gt=0.0, lt=1.0)] = knob(0.95, "Confidence level of the differences.")
    seed: NonNegativeInt = knob(0, "Seed of the bootstrap.")
    max_failure_share: Fraction | None = knob(
        None, "Above this share of failed calls a run is marked invalid; null: what it was made with."
    )
