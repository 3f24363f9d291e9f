"""What preflight finds wrong with a generative reward: all of it at once, each with its key."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from her_nemo.config import compose
from her_nemo.config.schema import PpoConfig
from her_nemo.planning import judge_checks, preflight

KEY, JUDGE = "reward.generative", "reward.generative.judge"
KIND = ["reward.kind=generative"]
MIX = ["reward.kind=mix", "reward.restore_from_path=/r", "reward.mix.generative=0.5"]
CHECKPOINT = [f"{JUDGE}.restore_from_path=/judge"]
SERVERS = [f"{JUDGE}.servers=['http://a:8000/v1','http://b:8000/v1']", f"{JUDGE}.model=grm"]
GROUP = ["model.ppo.num_samples_per_prompt=4", f"{KEY}.against=group"]
VALIDATION = "model.data.validation_ds.file_path=/v"


def config(*overrides: str) -> PpoConfig:
    given = ["pretrained_checkpoint.restore_from_path=/m", "model.data.train_ds.file_path=/d"]
    loaded = compose.load("ppo", [*given, "model.global_batch_size=64", *overrides])
    assert isinstance(loaded, PpoConfig)
    return loaded


def found(*overrides: str, **environment: str) -> dict[str, str]:
    return {problem.key: str(problem) for problem in judge_checks.check(config(*overrides), environment)}


@pytest.mark.parametrize(
    "overrides",
    [[], [*KIND, *CHECKPOINT], [*KIND, *SERVERS], [*MIX, *CHECKPOINT], [*KIND, *CHECKPOINT, *GROUP],
     [*KIND, *CHECKPOINT, *GROUP, VALIDATION, "model.ppo.num_val_samples=0"], [*KIND, *CHECKPOINT, VALIDATION],
     ["reward.kind=rules"], ["reward.kind=mix", "reward.restore_from_path=/r"]],
)  # fmt: skip
def test_nothing_is_wrong(overrides: list[str]) -> None:
    assert found(*overrides) == {}


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (KIND, JUDGE, "there is no judge"),
        (MIX, JUDGE, "there is no judge"),
        ([*KIND, *CHECKPOINT, *SERVERS], JUDGE, "both a checkpoint and servers"),
        ([*KIND, SERVERS[0]], f"{JUDGE}.model", "has to be given with servers"),
        ([*KIND, f"{JUDGE}.servers=['a:8000']", SERVERS[1]], f"{JUDGE}.servers", "entry 0, 'a:8000', is no address"),
        ([*KIND, f"{JUDGE}.servers=['http://a/v1','http://a/v1/']", SERVERS[1]], f"{JUDGE}.servers", "twice"),
        ([*KIND, *SERVERS, f"{JUDGE}.api_key_env=NOT_SET"], f"{JUDGE}.api_key_env", "NOT_SET is not set"),
        ([*KIND, *SERVERS, f"{JUDGE}.micro_batch_size=4"], f"{JUDGE}.micro_batch_size", "judge from servers"),
        ([*KIND, *CHECKPOINT, f"{JUDGE}.concurrency=4"], f"{JUDGE}.concurrency", "judge from a checkpoint"),
        ([*KIND, *CHECKPOINT, f"{KEY}.against=reference"], f"{KEY}.replies", "has to be given"),
        ([*KIND, *CHECKPOINT, f"{KEY}.replies=/nope"], f"{KEY}.replies", "no such file"),
        ([*KIND, *CHECKPOINT, *GROUP, f"{KEY}.replies=/d"], f"{KEY}.replies", "has no effect with"),
        ([*KIND, *CHECKPOINT, GROUP[1]], f"{KEY}.against", "there is 1 reply to a prompt"),
        ([*KIND, *CHECKPOINT, *GROUP, VALIDATION], f"{KEY}.against", "validation would measure nothing"),
        (["reward.kind=rules", *CHECKPOINT], f"{KEY}.judge", "has no effect with reward.kind=rules"),
        (["reward.kind=mix", f"{KEY}.against=group"], f"{KEY}.against", "has no effect with reward.kind=mix"),
    ],
)  # fmt: skip
def test_what_is_wrong(overrides: list[str], key: str, words: str) -> None:
    problems = found(*overrides)
    assert words in problems.get(key, ""), problems


def test_a_key_in_the_environment(tmp_path: Path) -> None:
    given = [*KIND, *SERVERS, f"{JUDGE}.api_key_env=JUDGE_KEY"]
    assert found(*given, JUDGE_KEY="sesame") == {}
    (tmp_path / "file").write_text("")
    assert "is a file" in found(*KIND, *SERVERS, f"{KEY}.cache_dir={tmp_path}/file")[f"{KEY}.cache_dir"]


def test_the_judge_s_checkpoint_is_looked_at_but_may_have_words_of_its_own(tmp_path: Path) -> None:
    shape = {
        "model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 2048,
    }  # fmt: skip
    for name, changes in (("policy", {}), ("judge", {"vocab_size": 2048}), ("odd", {"intermediate_size": 255})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(shape | changes))

    def problems(judge: str) -> dict[str, str]:
        place, layout = f"{JUDGE}.restore_from_path", "model.tensor_model_parallel_size=2"
        start = f"pretrained_checkpoint.restore_from_path={tmp_path}/policy"
        loaded = config(*KIND, f"{place}={tmp_path}/{judge}", start, layout, "trainer.devices=2")
        return {found.key: str(found) for found in preflight.check(loaded)}

    key = f"{JUDGE}.restore_from_path"
    assert key not in problems("judge")
    assert "no such directory" in problems("nowhere")[key]
    assert "2 does not divide model.ffn_hidden_size = 255" in problems("odd")[key]


def test_everything_at_once_with_exit_code_two(her_nemo: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = her_nemo(
        "ppo", "pretrained_checkpoint.restore_from_path=/nope", "model.data.train_ds.file_path=/nope", *KIND,
        f"{KEY}.against=reference", f"{JUDGE}.servers=['x']", f"{JUDGE}.api_key_env=NOT_SET",
    )  # fmt: skip
    assert done.returncode == 2
    for words in ("has to be given with servers", "'x', is no address", "NOT_SET is not set",
                  "reward.generative.replies", "pretrained_checkpoint.restore_from_path: /nope"):  # fmt: skip
        assert words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
