"""The command line of a rollout server, as slurm/servers.sh and a user call it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from her_nemo.rollout import vllm_server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a policy's config.json, which is all that a server reads."""
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 96,
        "vocab_size": 128, "max_position_embeddings": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_what_is_given_reaches_vllm_and_what_is_unknown_too(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(model), "--port", "8123", "--max-model-len", "256", "--sync", "files", "--seed", "7", "--print"]
    assert vllm_server.main(words) == 0
    said = shlex.split(capsys.readouterr().out)
    assert "VLLM_SERVER_DEV_MODE=1" in said
    assert said[said.index("--model") + 1] == str(model)
    assert said[said.index("--port") + 1] == "8123"
    assert said[said.index("--host") + 1] == "0.0.0.0"
    assert said[said.index("--max-model-len") + 1] == "256"
    assert json.loads(said[said.index("--weight-transfer-config") + 1]) == {"backend": "her_nemo_files"}
    assert said[said.index("--worker-extension-cls") + 1] == "her_nemo.rollout.vllm_worker.WeightReceiver"
    assert said[-2:] == ["--seed", "7"]


def test_the_longest_sequence_is_the_models(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vllm_server.main([str(model), "--print"]) == 0
    said = shlex.split(capsys.readouterr().out)
    assert said[said.index("--max-model-len") + 1] == "512"


def test_a_directory_without_a_model_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vllm_server.main([str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "nowhere" in said.err


def test_a_model_that_vllm_cannot_run_is_one_too(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((model / "config.json").read_text()) | {"head_dim": 16}
    (model / "config.json").write_text(json.dumps(config))
    assert vllm_server.main([str(model), "--print"]) == 2
    assert "head size 16, which vLLM cannot run on CPU" in capsys.readouterr().err
