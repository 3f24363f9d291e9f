"""The sections that all benchmarks share: who answers, how they are asked, how sure the figures are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from her_nemo.config.base import Section, knob
from her_nemo.config.endpoints import RequestLimits
from her_nemo.config.sections import Fraction, StageConfig, TopP, required


class ChatSampling(Section):
    """`ROLE.sampling.*`: how a model answers. Every key is part of the cache key."""

    temperature: NonNegativeFloat = knob(0.0, "0 is greedy.")
    top_p: TopP = 1.0
    max_tokens: PositiveInt = knob(2048, "Longest answer, tokens.")
    seed: NonNegativeInt | None = knob(
        None, "Seed sent with each request (plus the attempt and the run); null sends none."
    )


class ChatModel(Section):
    """`ROLE.*`: one model behind an OpenAI-compatible endpoint."""

    endpoint: str | None = knob(None, "Base URL of an OpenAI-compatible API, e.g. http://localhost:8000/v1.")
    model: str | None = knob(None, "The model's name at the endpoint; null takes the only one it lists.")
    checkpoint: str | None = knob(
        None, "A Hugging Face directory instead of an endpoint: a vLLM server is started for it."
    )
    api_key_env: str | None = knob(None, "Environment variable that holds the key; null sends none.")
    revision: str | None = knob(
        None, "Tells apart models that are served under one name; part of the cache key."
    )
    extra_body: dict[str, str | int | float | bool] = knob(
        {}, "Further fields of each request, e.g. {reasoning_effort: low}; part of the cache key."
    )
    sampling: ChatSampling = ChatSampling()

    @property
    def given(self) -> bool:
        """Whether it says who answers."""
        return self.endpoint is not None or self.checkpoint is not None


class JudgeModel(ChatModel):
    """`judge.*`: the model that judges."""

    structured_output: Literal["json_schema", "json_object", "none"] = knob(
        "json_schema", "What is asked of the judge's endpoint; every answer is validated here all the same."
    )
    attempts: PositiveInt = knob(3, "Answers asked for a judgement before it counts as failed.")


class ServerKeys(Section):
    """`server.*`: of the vLLM servers that are started for checkpoints."""

    dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto", "vLLM's arithmetic; auto: float32 on CPU, on CUDA half."
    )
    max_model_len: PositiveInt | None = knob(None, "vLLM's longest sequence; null takes the model's.")
    max_num_seqs: PositiveInt = knob(64, "Sequences decoded together.")
    tensor_parallel_size: PositiveInt = knob(1, "GPUs one server is cut over.")
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = knob(
        0.9, "Share of a GPU's memory that a server takes; without meaning on CPU."
    )
    start_seconds: PositiveInt = knob(900, "Longest wait for a server to come up.")


class Certainty(Section):
    """`statistics.*`: intervals, and what makes a result invalid."""

    resamples: PositiveInt = knob(10_000, "Bootstrap resamples; up to 7 scenes all are enumerated instead.")
    level: Annotated[float, Field(gt=0.0, lt=1.0)] = knob(0.95, "Confidence level of the intervals.")
    seed: NonNegativeInt = knob(0, "Seed of the bootstrap.")
    max_failure_share: Fraction = knob(
        0.05, "Above this share of failed judgements, or of failed simulations, the result is marked invalid."
    )


class BenchmarkConfig(StageConfig):
    """What every benchmark that asks endpoints has."""

    out: str = required("Directory for results.json, scenes.jsonl and the cache.")
    cache_dir: str | None = knob(
        None, "Directory of cached answers, may be shared by runs; null: <out>/cache."
    )
    runs: PositiveInt = knob(1, "Times each scene is played and judged, each with seeds of its own.")
    seed: NonNegativeInt = knob(0, "Seeds every choice that this machine makes.")
    limits: RequestLimits = RequestLimits()
    statistics: Certainty = Certainty()
    server: ServerKeys = ServerKeys()


class CoserConfig(BenchmarkConfig):
    """`her-nemo evaluate benchmark=coser`: CoSER's given-circumstance acting."""

    scenes: str = required("CoSER's test_set.json, or a file of the same form.")
    num_scenes: Annotated[int, Field(ge=-1)] = knob(-1, "Scenes to take from the file's head; -1 takes all.")
    protocol: Literal["upstream", "her", "fixed"] = knob(
        "fixed", "Whose choices: CoSER's repository, HER's fork, or ours without their slips (docs/evaluation.md)."
    )
    layout: Literal["auto", "her", "coser"] = knob(
        "auto", "How the actor is prompted and writes: HER's tags or CoSER's brackets; auto: coser for upstream."
    )
    dialect: Literal["auto", "her", "coser"] = knob(
        "auto", "How the messages of the file are written; auto: her where one has HER's tags."
    )
    max_rounds: PositiveInt = knob(20, "Messages of a dialogue at most, the given ones included.")
    continue_from: NonNegativeInt = knob(0, "Messages taken from the data before the actor goes on.")
    retrieval: Literal["none", "raw_text", "expr1", "expr3", "conv1", "expr3_conv1", "expr10_conv1"] = knob(
        "none", "What actors are reminded of: the book's text, past experience, conversations (how many of each)."
    )
    books: str | None = knob(None, "With retrieval: the directory of CoSER's BOOK.json files.")
    prompts_dir: str | None = knob(None, "Directory of prompt files to use before the packaged ones.")
    actor: ChatModel = ChatModel()
    judge: JudgeModel = JudgeModel()
    environment: ChatModel = ChatModel()
    next_speaker: ChatModel = ChatModel()
