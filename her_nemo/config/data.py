"""Configurations of the data stages that ask no model: `her-nemo data ingest` and `her-nemo data inspect`."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from her_nemo.config.sections import Shares, StageConfig, knob, required

Source = Literal[
    "auto",
    "coser",
    "coser_book",
    "coser_sharegpt",
    "coser_test",
    "her",
    "her_full",
    "her_multi_turn",
    "her_single_turn",
    "messages",
    "aligner",
    "aligner_sft",
    "aligner_rm",
    "conversations",
]


class IngestConfig(StageConfig):
    """`her-nemo data ingest`: files of any known format -> Parquet, splits and a data card."""

    source: Source = knob("auto", "The format, or the family it is told in; auto looks at the rows.")
    path: str | list[str] = required("A file, a directory, a datasets name, or a list of these.")
    out: str = required("Directory for conversations, samples, splits, quarantine and card.")
    dataset_config: str | None = knob(None, "With a datasets name: its configuration.")
    dataset_split: str | None = knob(None, "With a datasets name: its split; null takes all.")
    dialect: Literal["auto", "her", "coser", "starred", "plain"] = knob(
        "auto", "How thoughts and actions are written; auto takes the format's own."
    )
    book: str | None = knob(None, "Name of the book; null takes it from the data or the file's name.")
    character: str | None = knob(
        None, "Who the assistant is; null takes it from the row, the reply or the system prompt."
    )
    speakers: Literal["key", "profiled"] = knob(
        "key", "Whose turns become samples: key characters', or everyone's with a profile."
    )
    plans: Literal["auto", "require", "any"] = knob(
        "auto", "auto: where a conversation has plans, only turns with one become samples."
    )
    layout: Literal["her", "her_natural", "her_structured"] = knob(
        "her", "How the system prompts made from conversations are laid out (docs/roleplay.md)."
    )
    allow_defects: list[str] = knob([], "Defects that do not keep a reply out of the samples.")
    unit: Literal["conversation", "book"] = knob("conversation", "What a split keeps together.")
    shares: Shares = Shares()
    seed: NonNegativeInt = knob(0, "Seeds the splits.")
    hold_out: bool = knob(True, "Keep what the source itself marks as test data for testing.")
    test_set: str | None = knob(
        None, "A test set in any known format: what is the same as one of its conversations is for testing."
    )


class InspectConfig(StageConfig):
    """`her-nemo data inspect`: one row in colour."""

    path: str = required("A Parquet or JSON-lines file of samples, prompts, pairs or conversations.")
    row: NonNegativeInt = knob(0, "Which row, from 0.")
    turn: NonNegativeInt | None = knob(
        None, "Of a conversation: which turn to take apart; null shows them all."
    )
    tokenizer: str | None = knob(None, "A tokenizer directory: then the mask is shown token by token.")
    width: PositiveInt | None = knob(None, "Columns; null takes the terminal's.")
