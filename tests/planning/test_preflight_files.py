"""What is looked for inside files and on the disk, case by case."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from her_nemo.config import compose
from her_nemo.config.schema import PpoConfig, RewardConfig, SftConfig
from her_nemo.planning import preflight_files
from her_nemo.planning.shapes import Shape, total_parameters

ARCHITECTURE = {
    "num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 32, "vocab_size": 1024, "share_embeddings_and_output_weights": True,
}  # fmt: skip
HF = {
    "model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024, "rope_theta": 1e6,
    "tie_word_embeddings": True,
}  # fmt: skip
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TRAIN, RUN = "model.data.train_ds.file_path", "exp_manager.explicit_log_dir"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model directory with a tokenizer of 1,024 tokens, and a good data file."""
    (tmp_path / "hf").mkdir()
    write_tokenizer(tmp_path, last=1023)
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    return tmp_path


def write_tokenizer(place: Path, last: int) -> None:
    body = {
        "model": {"vocab": {"a": 0, "b": last - 1}},
        "added_tokens": [{"id": last, "content": "<|im_end|>"}],
    }
    (place / "hf" / "tokenizer.json").write_text(json.dumps(body))


def found(place: Path, stage: str = "sft", *overrides: str) -> dict[str, str]:
    given = [
        f"pretrained_checkpoint.restore_from_path={place}/hf",
        f"{TRAIN}={place}/data.jsonl",
        f"{RUN}={place}/run",
    ]
    if stage == "ppo":
        given.append(f"reward.restore_from_path={place}/hf")
    config = compose.load(stage, [*given, *overrides])
    assert isinstance(config, SftConfig | RewardConfig | PpoConfig)
    return {problem.key: str(problem) for problem in preflight_files.check(config, ARCHITECTURE)}


def checkpoint(place: Path, **changes: object) -> None:
    step = place / "run" / "checkpoints" / "step_00000010"
    step.mkdir(parents=True)
    (step.parent / "latest").write_text("step_00000010\n")
    shape = (
        {key: value for key, value in ARCHITECTURE.items() if not key.startswith("share")}
        | {"tied": True}
        | changes
    )
    (step / "manifest.json").write_text(json.dumps({"models": {"model": {"shape": shape}}}))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_nothing_wrong(place: Path, stage: str) -> None:
    assert found(place, stage) == {}


def test_rows(place: Path) -> None:
    assert "data.jsonl:1: has no chosen, rejected" in found(place, "reward")[TRAIN]
    (place / "data.jsonl").write_text('\n{"messages": []}\n{"text": 1}\n')
    assert "data.jsonl:3: has no messages" in found(place)[TRAIN]
    (place / "data.jsonl").write_text("{oops\n")
    assert "data.jsonl:1: not JSON" in found(place)[TRAIN]
    (place / "data.jsonl").write_text("[1]\n")
    assert "has no messages" in found(place)[TRAIN]


def test_a_token_beyond_the_embedding(place: Path) -> None:
    write_tokenizer(place, last=1024)
    assert "has token 1024, but the model's embedding has 1024 rows" in str(found(place))
    (place / "hf" / "tokenizer.json").write_text("{}")
    assert "cannot be read as a tokenizer" in str(found(place))


def test_the_checkpoint_that_would_be_resumed(place: Path) -> None:
    text = found(place, "sft", "exp_manager.resume_ignore_no_checkpoint=false")[RUN]
    assert "no checkpoint to resume" in text
    checkpoint(place, max_position_embeddings=7)
    assert found(place) == {}
    assert (
        "holds checkpoints of an earlier run"
        in found(place, "sft", "exp_manager.resume_if_exists=false")[RUN]
    )


def test_another_models_checkpoint(place: Path) -> None:
    checkpoint(place, hidden_size=256)
    assert "another model's: hidden_size 256 (wanted 128)" in found(place)[RUN]


def test_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape.from_architecture(ARCHITECTURE)
    one = total_parameters(shape) * 12  # fp32 weights and two moments
    config = compose.load(
        "sft", [f"pretrained_checkpoint.restore_from_path={place}/hf", f"{TRAIN}=x", f"{RUN}={place}/run"]
    )
    assert isinstance(config, SftConfig)
    assert preflight_files.checkpoint_bytes(config, shape) == one
    usage = type("Usage", (), {"free": 3 * one - 1})
    monkeypatch.setattr(preflight_files.shutil, "disk_usage", lambda _: usage)
    assert "3 checkpoints" in found(place)[RUN]
    assert found(place, "sft", "exp_manager.checkpoint_callback_params.save_top_k=1") == {}
    assert "3 checkpoints" in found(place, "ppo", "precision=bf16")[RUN]


def others(stage: str, *overrides: str) -> dict[str, str]:
    config = compose.load(stage, list(overrides))
    return {problem.key: str(problem) for problem in preflight_files.check_others(config)}


def test_room_for_what_convert_and_export_write(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "hf" / "config.json").write_text(json.dumps(HF))
    checkpoint(place)
    parameters = total_parameters(Shape.from_architecture(ARCHITECTURE))
    usage = type("Usage", (), {"free": 3 * parameters})
    monkeypatch.setattr(preflight_files.shutil, "disk_usage", lambda _: usage)
    convert = [f"source={place}/hf", f"out={place}/new"]
    assert "the weights are 0.0 GB, but 0 GB free" in others("convert", *convert)["out"]
    assert others("convert", *convert, "trainer.precision=bf16") == {}
    export = [f"checkpoint={place}/run", f"out={place}/new"]
    assert others("export", *export) == {}  # bfloat16
    assert "free space" in others("export", *export, "dtype=float32")["out"]


def test_the_rows_and_the_vocabulary_of_evaluate(place: Path) -> None:
    (place / "hf" / "config.json").write_text(json.dumps(HF))
    given = [f"model={place}/hf", f"prompts={place}/data.jsonl", f"out={place}/new"]
    assert others("evaluate", *given) == {}
    # The oracle's scenes are found by the prompts' trace_id.
    assert "data.jsonl:1: has no trace_id" in others("evaluate", *given, "scenes=x")["prompts"]
    write_tokenizer(place, last=2000)
    assert "has token 2000" in others("evaluate", *given)["model"]


def test_rows_of_synthesis_and_columns_of_parquet(place: Path) -> None:
    given = ["endpoint=http://h/v1", "model=m", f"out={place}/new"]
    wrong = others("data_synthesise", *given, "stage=settings", f"source={place}/data.jsonl")
    assert "has no conversation_id, characters, turns" in wrong["source"]
    pairs = others("data_synthesise", *given, "stage=principles", f"source={place}/data.jsonl")
    assert "has no chosen, rejected" in pairs["source"]
    ingested = place / "ingested"
    ingested.mkdir()
    table = pyarrow.table({"conversation_id": ["a"], "characters": [["x"]], "turns": [["y"]]})
    pyarrow.parquet.write_table(table, ingested / "conversations.parquet")
    assert others("data_synthesise", *given, "stage=all", f"source={ingested}") == {}
    pyarrow.parquet.write_table(table.drop_columns(["turns"]), ingested / "conversations.parquet")
    assert "has no turns" in others("data_synthesise", *given, "stage=all", f"source={ingested}")["source"]
    (ingested / "conversations.parquet").write_text("PAR1")
    assert "not a Parquet file" in others("data_synthesise", *given, "stage=all", f"source={ingested}")["source"]
