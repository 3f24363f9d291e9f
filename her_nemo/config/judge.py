"""The keys of `her-nemo data judge` and `her-nemo judge`: a judge's prompts, and how well it judges."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from her_nemo.config.sections import Section, StageConfig, TopK, TopP, knob, required


class JudgePromptsConfig(StageConfig):
    """`her-nemo data judge`: preference pairs -> a judge's prompts with labels, each pair in both orders."""

    source: str = required("Preference pairs: JSON lines or Parquet with trace_id, messages, chosen, rejected.")
    out: str = required("Directory for judge_prompts.jsonl and balance.json.")
    balance: bool = knob(
        True, "Leave out pairs until neither length nor the number of tags tells which reply is better."
    )
    brief: bool = knob(False, "One line of instructions, for judges trained with it, in place of HER's.")
    skip_malformed: bool = knob(False, "Skip and count malformed rows in place of stopping at them.")


class JudgeSampling(Section):
    """`sampling.*` of judge."""

    temperature: NonNegativeFloat = knob(0.0, "0 is greedy: the same question has the same answer.")
    top_k: TopK = 0
    top_p: TopP = 1.0
    max_tokens: PositiveInt = knob(1024, "Longest verdict, tokens, its reasoning included.")


class JudgeConfig(StageConfig):
    """`her-nemo judge`: verdicts from vLLM on held-out prompts of a judge, against their labels."""

    model: str = required("The Hugging Face directory of the judge.")
    prompts: str = required("Prompts with labels, both orders of each pair, as `her-nemo data judge` writes them.")
    out: str = required("Directory for samples.jsonl and eval.json.")
    num_prompts: Annotated[int, Field(ge=-1)] = knob(
        -1, "Prompts to take from the file's head; -1 takes all."
    )
    seed: NonNegativeInt = knob(0, "Seed of the sampling.")
    dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto", "vLLM's arithmetic; auto: float32 on CPU, on CUDA half."
    )
    tensor_parallel_size: PositiveInt = knob(1, "vLLM's tensor parallel size.")
    max_model_len: PositiveInt | None = knob(None, "vLLM's longest sequence; null takes the model's.")
    sampling: JudgeSampling = JudgeSampling()
