"""The keys of `her-nemo evaluate benchmark=reward_model`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from her_nemo.config.base import knob, required
from her_nemo.config.evaluation import Certainty
from her_nemo.config.sections import StageConfig


class RewardBenchConfig(StageConfig):
    """`her-nemo evaluate benchmark=reward_model`: a scalar reward model on labelled pairs, or a judge's verdicts."""

    model: str | None = knob(
        None, "The reward model: a Hugging Face directory with a scalar head (her-nemo export writes it)."
    )
    pairs: str | None = knob(
        None, "Labelled pairs for the model: JSON lines or Parquet with messages, chosen, rejected."
    )
    verdicts: str | None = knob(
        None, "Instead of model and pairs: samples.jsonl of her-nemo judge, verdicts on pairs in both orders."
    )
    out: str = required("Directory for report.json, results.json and scenes.jsonl.")
    num_pairs: Annotated[int, Field(ge=-1)] = knob(-1, "Rows to take from the file's head; -1 takes all.")
    dimension_key: str = knob(
        "dimension",
        "Field of a pair that says what its replies differ in, a text or a list; a pair may lack it.",
    )
    tie_margin: NonNegativeFloat = knob(0.0, "Scores at most this far apart are a tie.")
    max_length: PositiveInt | None = knob(
        None, "Tokens of prompt and reply at most; older turns are left out. Null takes the model's."
    )
    micro_batch_size: PositiveInt = knob(8, "Pairs scored at a time.")
    dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto",
        "The model's arithmetic; auto: float32 on CPU, on CUDA bfloat16. The head is always in float32.",
    )
    statistics: Certainty = Certainty()
