"""`her-nemo config show|diff|explain`."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from her_nemo.config import command, compose
from her_nemo.config.errors import ConfigErrors, UserError
from her_nemo.config.explain import explain
from her_nemo.config.keys import REQUIRED, leaves
from her_nemo.config.paragraphs import MORE
from her_nemo.config.partial import NOT_GIVEN
from her_nemo.config.schema import STAGES


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert command.main(list(words)) == 0
    return capsys.readouterr().out


def test_show_is_the_whole_configuration(capsys) -> None:
    whole = yaml.safe_load(said(capsys, "show", "sft", "model=qwen3_8b", "model.seed=3"))
    assert whole["model"]["hidden_size"] == 4096
    assert whole["model"]["seed"] == 3
    assert whole["exp_manager"]["explicit_log_dir"] == "runs/sft"
    assert whole["pretrained_checkpoint"]["restore_from_path"] == NOT_GIVEN
    assert json.loads(said(capsys, "show", "sft", "model=qwen3_8b", "model.seed=3", "--json")) == whole


def test_diff_names_value_default_and_who_set_it(capsys) -> None:
    rows = {row["key"]: row for row in json.loads(said(
        capsys, "diff", "ppo", "model=qwen3_8b", "cluster=h100_4x8", "model.seed=3", "--json"
    ))}  # fmt: skip
    assert rows["model.seed"] == {"key": "model.seed", "value": 3, "default": 1234, "set_by": "command line"}
    assert rows["model.hidden_size"]["set_by"].endswith("conf/model/qwen3_8b.yaml")
    assert rows["trainer.num_nodes"]["set_by"].endswith("conf/cluster/h100_4x8.yaml")
    assert rows["critic.optim.lr"]["set_by"].endswith("conf/ppo.yaml")
    assert rows["pretrained_checkpoint.restore_from_path"]["default"] == REQUIRED
    assert "model.micro_batch_size" not in rows
    text = said(capsys, "diff", "ppo", "model.seed=3")
    assert "(default 1234; set by command line)" in text


def test_diff_and_show_report_what_is_wrong(capsys) -> None:
    with pytest.raises(ConfigErrors, match="did you mean trainer"):
        command.main(["diff", "sft", "trainer.devises=2"])


def test_explain(capsys) -> None:
    text = said(capsys, "explain", "model.optim.lr")
    assert "Peak learning rate." in text
    assert "default 1e-05" in text
    assert "at least 0" in text
    assert "stages: sft, reward, ppo" in text
    assert "has to be given" in said(capsys, "explain", "pretrained_checkpoint.restore_from_path")
    assert "model.ppo.ratio_eps" in said(capsys, "explain", "model.ppo")
    assert "Without effect" in said(capsys, "explain", "trainer.ppo.trt_llm.enable")
    assert "Translated to pretrained_checkpoint" in said(capsys, "explain", "model.restore_from_path")
    with pytest.raises(UserError, match=r"did you mean model\.optim\.lr"):
        command.main(["explain", "model.lr"])


def test_every_key_can_be_explained() -> None:
    for schema in STAGES.values():
        for key, _ in compose.known_keys(schema):
            text = explain(key)
            assert text.startswith(f"{key}: ")
            assert not re.search(r"Annotated|FieldInfo|Literal|Optional|typing|None", text), text


def test_what_is_said_beyond_a_sentence_is_about_keys_there_are() -> None:
    values = {key for schema in STAGES.values() for key, _ in leaves(schema)}
    assert set(MORE) <= values
    assert all(text.endswith(".") for text in MORE.values())


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("exp_manager.max_time_per_run", r"type: text, written as ^(\d+:)?\d+:[0-5]\d:[0-5]\d$ or null; default null"),
        ("trainer.sft.limit_val_batches",
         "type: whole number, at least 0 or number, at least 0.0, at most 1.0 or null; default null"),
        ("model.optim.betas", "type: list of number, at least 0.0, at most 1.0"),
        ("trainer.precision", "type: one of 32, bf16, bf16-mixed; default 32"),
        ("extra_body", "or true or false by name; default {}"),
        ("seed", "seed: Seeds the splits.\n"),
        ("seed", "seed: Seed of the sampling.\n  type: whole number, at least 0; default 0\n  stages: evaluate"),
        ("model", "model: The Hugging Face directory to evaluate.\n"),
        ("model", "    model.ppo.ratio_eps"),
        ("sampling.temperature", "by stage: evaluate 1.0, data synthesise 0.7"),
        ("model.pipeline_model_parallel_size", "PP: ranks the layers are dealt out to. It divides the layers."),
    ],
)  # fmt: skip
def test_types_and_meanings_in_plain_words(key: str, words: str) -> None:
    assert words in explain(key)


@pytest.mark.parametrize("words", [["look", "sft"], ["show"], ["explain"], ["show", "sft", "--fast"]])
def test_what_cannot_be_understood(words: list[str]) -> None:
    with pytest.raises(UserError):
        command.main(words)
