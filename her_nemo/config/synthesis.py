"""The keys of `her-nemo data synthesise`."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from her_nemo.config.endpoints import RequestLimits
from her_nemo.config.sections import Fraction, Section, StageConfig, TopP, knob, required

SynthesisStage = Literal["role_thinking", "system_thinking", "settings", "all", "principles", "judge"]


class SynthesisSampling(Section):
    """`sampling.*`: how the model answers. Every key is part of the cache key."""

    temperature: NonNegativeFloat = knob(0.7, "0 is greedy.")
    top_p: TopP = 1.0
    max_tokens: PositiveInt = knob(8192, "Longest answer, tokens.")
    seed: NonNegativeInt | None = knob(
        None, "Seed sent with each request (plus the attempt); null sends none."
    )


class Limits(RequestLimits):
    """`limits.*`: what the endpoint and the purse can bear."""

    budget: PositiveFloat | None = knob(
        None, "Stop when this run has cost as much (in the unit of prices.*); null sets no limit."
    )


class Prices(Section):
    """`prices.*`: per million tokens, in any currency. Null leaves the cost out of the report."""

    prompt_per_million: NonNegativeFloat | None = knob(None, "Price of a million prompt tokens.")
    completion_per_million: NonNegativeFloat | None = knob(None, "Price of a million answer tokens.")


class RoleThinking(Section):
    """`role_thinking.*`: what a chapter's thoughts must be."""

    min_patterns: PositiveInt = knob(
        5, "Different segment patterns a chapter needs (or as many as its turns)."
    )
    max_same_running: PositiveInt = knob(2, "Turns in a row that may have the same pattern.")
    min_characters: PositiveInt = knob(50, "Shortest new thought, characters.")
    max_characters: PositiveInt = knob(200, "Longest new thought, characters.")


class SystemThinking(Section):
    """`system_thinking.*`: how plans are drawn and what they must be."""

    forward: Literal["structured", "reasoning"] = knob(
        "structured",
        "Where the raw plan comes from: structured asks for {reasoning, reply}; reasoning reads the model's own "
        "reasoning (reasoning_content, or <think> in the answer).",
    )
    min_characters: PositiveInt = knob(800, "Shortest plan that is written anew, characters.")
    max_characters: PositiveInt = knob(1500, "Longest plan that is written anew, characters.")
    min_kept_characters: PositiveInt = knob(200, "Shortest raw plan that may be kept or turned, characters.")
    max_kept_characters: PositiveInt = knob(3000, "Longest raw plan that may be kept or turned, characters.")


class Settings(Section):
    """`settings.*`: what may be added to a character's profile."""

    source_characters: PositiveInt = knob(
        24000, "Source text shown at most, characters; the passages nearest to the gaps are taken."
    )
    max_additions: PositiveInt = knob(6, "Sentences added per character and conversation at most.")


class PrinciplesStage(Section):
    """`principles.*`: from preference pairs to a library."""

    embedding_model: str | None = knob(
        None, "Model of the endpoint's /embeddings; null takes TF-IDF (scikit-learn)."
    )
    max_distance: Fraction = knob(0.7, "Clusters farther apart than this (cosine distance) are not joined.")
    min_cluster: PositiveInt = knob(2, "Cases a cluster needs to enter the library.")


class JudgeTranscripts(Section):
    """`judge.*`: transcripts for the SFT of a judge, from preference pairs (docs/judge.md)."""

    library: str | None = knob(
        None, "Principles shown to the labeller, a file as stage=principles writes it; null: those of her_nemo."
    )
    balance: bool = knob(
        True, "Leave out pairs until neither length nor the number of tags tells which reply is better."
    )
    brief: bool = knob(False, "One line of instructions in the judge's own prompt, in place of HER's.")


class SynthesiseConfig(StageConfig):
    """`her-nemo data synthesise`."""

    stage: SynthesisStage = required(
        "What to write: role_thinking, system_thinking, settings, all, principles, judge."
    )
    source: str = required(
        "Conversations (JSONL or Parquet from data ingest); for principles and judge preference pairs."
    )
    out: str = required("Directory for the results.")
    endpoint: str = required("Base URL of an OpenAI-compatible API, e.g. http://localhost:8000/v1.")
    model: str = required("The model's name at the endpoint.")
    api_key_env: str | None = knob(None, "Environment variable that holds the key; null sends none.")
    structured_output: Literal["json_schema", "json_object", "none"] = knob(
        "json_schema", "What is asked of the endpoint; every answer is validated here all the same."
    )
    extra_body: dict[str, str | int | float | bool] = knob(
        {}, "Further fields of each request, e.g. {reasoning_effort: low}; part of the cache key."
    )
    attempts: PositiveInt = knob(3, "Answers asked for a unit before it is quarantined.")
    keep_quarantined: bool = knob(
        False, "Write conversations with a quarantined unit among the results, without what failed."
    )
    cache_dir: str | None = knob(None, "Directory of cached answers; null: <out>/cache.")
    prompts_dir: str | None = knob(None, "Directory of prompt files to use before the packaged ones.")
    prompt_versions: dict[str, int] = knob(
        {}, "Version by prompt name, e.g. {role_thinking: 1}; newest otherwise."
    )
    sampling: SynthesisSampling = SynthesisSampling()
    limits: Limits = Limits()
    prices: Prices = Prices()
    role_thinking: RoleThinking = RoleThinking()
    system_thinking: SystemThinking = SystemThinking()
    settings: Settings = Settings()
    principles: PrinciplesStage = PrinciplesStage()
    judge: JudgeTranscripts = JudgeTranscripts()
