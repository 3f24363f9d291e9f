"""vLLM reads the FP8 files with its own loader and layers; a plain product stands in where this CPU has no kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from her_nemo.megatron import block_fp8
from her_nemo.megatron.safetensors_files import HfTensors, TensorFileWriter
from her_nemo.rollout.engine import Sampling
from her_nemo.rollout.vllm_engine import VllmEngine, configure_environment

pytestmark = pytest.mark.vllm

PROMPTS = [
    torch.randint(3, 1024, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 17, 33)
]


def quantised(source: Path, out: Path) -> Path:
    """The model in `source` as the export writes it in FP8."""
    view = block_fp8.Quantised(HfTensors(source))
    stored = view.stored()
    out.mkdir()
    shapes = {name: size for name, (size, _) in stored.items()}
    writer = TensorFileWriter(out / "model.safetensors", shapes, {name: kind for name, (_, kind) in stored.items()})
    for name, (size, kind) in stored.items():
        writer.write(name, 0, view.rows(name, 0, size[0]).to(kind).contiguous())
    writer.finish()
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    config["quantization_config"] = block_fp8.quantization_config("lm")
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's kernels for these files on a CPU need AMX; without it, a matrix product with the dequantised weight."""
    configure_environment()
    if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported():
        return
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
        Fp8BlockScaledMMLinearKernel,
    )
    from vllm.platforms import PlatformEnum

    class Plain(Fp8BlockScaledMMLinearKernel):
        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, None]:
            return True, None

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            """Nothing to pack."""

        def apply_block_scaled_mm(self, A, B, As, Bs):
            raise NotImplementedError

        def apply_weights(self, layer, x, bias=None, **more):
            held = self._get_layer_params(layer)
            spread = held.block_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            spread = spread[: held.weight.shape[0], : held.weight.shape[1]]
            return torch.nn.functional.linear(x, (held.weight.float() * spread).to(x.dtype), bias)

    monkeypatch.setitem(linear._POSSIBLE_FP8_BLOCK_KERNELS, PlatformEnum.CPU, [Plain])


@pytest.mark.usefixtures("kernel")
def test_log_probs_are_those_of_the_dequantised_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=1024, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=False, max_position_embeddings=128,
        initializer_range=0.05, eos_token_id=2,
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "hf")
    out = quantised(tmp_path / "hf", tmp_path / "fp8")
    back = block_fp8.Dequantised(HfTensors(out))
    model.load_state_dict({name: back.whole(name).float() for name in back.names()})
    with VllmEngine(out, dtype="bfloat16") as engine:
        rollout = engine.generate(PROMPTS, Sampling(temperature=1.0, max_tokens=24), seed=1)
    gaps = []
    for prompt, reply, said in zip(rollout.prompt_ids, rollout.response_ids, rollout.log_probs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]
        gaps.append((exact - torch.tensor(said)).abs())
    # vLLM computes in bf16 here: it takes FP8 files in half precision only.
    assert float(torch.cat(gaps).mean()) < 0.02
    assert float(torch.cat(gaps).max()) < 0.1
