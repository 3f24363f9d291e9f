"""The model files against transformers' Qwen3Config, and shapes read back from what lies beside weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from her_nemo.config import compose
from her_nemo.config.architecture import architecture_from_hf, architecture_from_megatron
from her_nemo.config.errors import UserError
from her_nemo.config.schema import ARCHITECTURE_KEYS, SftConfig

REQUIRED = ["pretrained_checkpoint.restore_from_path=/x", "model.data.train_ds.file_path=/y"]
# name: layers, hidden, feed-forward, heads, groups, tied, parameters (counting a tied embedding once)
RELEASED = {
    "qwen3_0_6b": (28, 1024, 3072, 16, 8, True, 0.6e9),
    "qwen3_1_7b": (28, 2048, 6144, 16, 8, True, 1.7e9),
    "qwen3_4b": (36, 2560, 9728, 32, 8, True, 4.0e9),
    "qwen3_8b": (36, 4096, 12288, 32, 8, False, 8.2e9),
    "qwen3_14b": (40, 5120, 17408, 40, 8, False, 14.8e9),
    "qwen3_32b": (64, 5120, 25600, 64, 8, False, 32.8e9),
}
ALL = [*RELEASED, "qwen3_tiny"]


def given(name: str) -> dict[str, int | float | bool]:
    config = compose.load("sft", [*REQUIRED, f"model={name}"])
    assert isinstance(config, SftConfig)
    return config.model.architecture()


def qwen3_config(shape: dict[str, int | float | bool]):
    from transformers import Qwen3Config

    return Qwen3Config(
        num_hidden_layers=shape["num_layers"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["ffn_hidden_size"],
        num_attention_heads=shape["num_attention_heads"],
        num_key_value_heads=shape["num_query_groups"],
        head_dim=shape["kv_channels"],
        vocab_size=shape["vocab_size"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rotary_base"]},
        rms_norm_eps=shape["layernorm_epsilon"],
        tie_word_embeddings=shape["share_embeddings_and_output_weights"],
        max_position_embeddings=shape["max_position_embeddings"],
        initializer_range=shape["init_method_std"],
    )


@pytest.mark.parametrize("name", ALL)
def test_model_files_are_complete_and_hold_architecture_only(name: str) -> None:
    from omegaconf import OmegaConf

    assert set(OmegaConf.load(compose.conf_dir() / "model" / f"{name}.yaml")) == set(ARCHITECTURE_KEYS)


@pytest.mark.parametrize("name", RELEASED)
def test_released_shapes(name: str) -> None:
    shape = given(name)
    keys = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    assert (*(shape[key] for key in keys), shape["share_embeddings_and_output_weights"]) == RELEASED[name][:6]
    assert (shape["kv_channels"], shape["vocab_size"], shape["rotary_base"]) == (128, 151936, 1e6)
    assert (shape["layernorm_epsilon"], shape["max_position_embeddings"]) == (1e-6, 40960)


@pytest.mark.parametrize("name", RELEASED)
def test_the_parameters_counted_by_transformers_are_those_of_the_model_s_name(name: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(qwen3_config(given(name)))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == pytest.approx(RELEASED[name][6], rel=0.02)


@pytest.mark.parametrize("name", ALL)
def test_there_and_back_through_config_json(name: str, tmp_path: Path) -> None:
    shape = given(name)
    qwen3_config(shape).save_pretrained(tmp_path)
    assert architecture_from_hf(tmp_path) == shape


def test_the_config_json_of_older_transformers(tmp_path: Path) -> None:
    body = {
        "model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "rope_theta": 1000000, "rope_scaling": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "max_position_embeddings": 40960, "initializer_range": 0.02, "attention_bias": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(body))
    assert architecture_from_hf(tmp_path) == given("qwen3_0_6b")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "dense Qwen3"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"hidden_size": None}, "missing hidden_size"),
    ],
)
def test_what_is_not_a_dense_qwen3_is_refused(change: dict, words: str, tmp_path: Path) -> None:
    body = {
        "model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "rope_theta": 1e6,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(body | change))
    with pytest.raises(UserError, match=words):
        architecture_from_hf(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        architecture_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        architecture_from_hf(tmp_path)
    with pytest.raises(UserError, match=r"no finished checkpoint"):
        architecture_from_megatron(tmp_path)
