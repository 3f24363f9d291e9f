"""The keys of `her-nemo chat`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from her_nemo.config.sections import Section, StageConfig, TopK, TopP, knob, required


class ReplySampling(Section):
    """`sampling.*` of chat: how replies are drawn."""

    temperature: NonNegativeFloat = knob(1.0, "0 is greedy.")
    top_k: TopK = 0
    top_p: TopP = 0.95
    max_tokens: PositiveInt = knob(1024, "Longest reply, tokens.")
    seed: NonNegativeInt | None = knob(
        None, "Seed sent with each request, plus the number of the reply; null sends none."
    )


class Partner(Section):
    """`partner.*`: the model that plays the others where no person does."""

    endpoint: str | None = knob(
        None, "Base URL of an OpenAI-compatible API; null: the model that plays the character plays the others too."
    )
    model: str | None = knob(None, "The model's name at partner.endpoint; null takes the only one it lists.")
    api_key_env: str | None = knob(None, "Environment variable that holds the key; null sends none.")


class ChatConfig(StageConfig):
    """`her-nemo chat`: talk to a model in a scene, in the terminal or in a browser, and keep what comes of it."""

    checkpoint: str | None = knob(
        None, "A Hugging Face directory: a vLLM server is started for it. Give this or endpoint."
    )
    endpoint: str | None = knob(
        None, "Base URL of an OpenAI-compatible API, e.g. http://localhost:8000/v1. Give this or checkpoint."
    )
    model: str | None = knob(None, "The model's name at the endpoint; null takes the only one it lists.")
    api_key_env: str | None = knob(None, "Environment variable that holds the key; null sends none.")
    scenes: str | list[str] | None = knob(
        None, "Files of scenes: what data ingest reads, prompts, pairs; null makes scenes of the miniature world."
    )
    num_scenes: Annotated[int, Field(ge=-1)] = knob(100, "Scenes to take from the head of the files; -1 takes all.")
    scene: NonNegativeInt | None = knob(None, "Which scene to begin with, from 0; null asks.")
    character: str | None = knob(None, "Whom the model plays; null asks where there is a choice.")
    turns: NonNegativeInt | None = knob(
        None, "Turns of the scene's own conversation to begin after; null: those before the character's first one."
    )
    layout: Literal["her", "her_natural", "her_structured"] = knob(
        "her", "How the system prompts made from conversations are laid out (docs/roleplay.md)."
    )
    plans: bool = knob(True, "System prompts made from conversations ask for a plan before each reply.")
    out: str = required("Directory for samples.jsonl, pairs.jsonl and the server's log.")
    web: bool = knob(False, "A page in the browser instead of the terminal; --web is short for it.")
    host: str = knob("127.0.0.1", "With web: the address to listen on; any but this machine's own is open to others.")
    port: Annotated[int, Field(ge=0, le=65535)] = knob(8817, "With web: the port; 0 takes any that is free.")
    timeout_seconds: PositiveFloat = knob(300.0, "Longest wait for the next piece of a reply.")
    dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto", "With checkpoint: vLLM's arithmetic; auto: float32 on CPU, on CUDA half."
    )
    tensor_parallel_size: PositiveInt = knob(1, "With checkpoint: vLLM's tensor parallel size.")
    max_model_len: PositiveInt | None = knob(
        None, "With checkpoint: vLLM's longest sequence; null takes the model's."
    )
    start_seconds: PositiveFloat = knob(900.0, "With checkpoint: longest wait for the server to come up.")
    sampling: ReplySampling = ReplySampling()
    partner: Partner = Partner()
