"""The export in FP8: proved weight by weight, written as Qwen3's own FP8 files are, and not fooled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversion_files import SHAPE, load, write
from safetensors.torch import load_file
from stage_files import Place

from her_nemo.config import compose
from her_nemo.config.errors import UserError
from her_nemo.megatron import block_fp8, qwen3_map
from her_nemo.megatron.qwen3 import Qwen3Shape
from her_nemo.megatron.safetensors_files import INDEX_FILE, HfTensors
from her_nemo.planning import preflight
from her_nemo.stages import export
from her_nemo.training import source as sources

# All sides of matrices are multiples of 128, and differ.
BLOCKS = replace(
    SHAPE, num_layers=2, hidden_size=128, ffn_hidden_size=384, num_attention_heads=4, num_query_groups=2, kv_channels=64
)
HEADS = {"lm": ("lm", "model", BLOCKS), "reward": ("scalar", "critic", replace(BLOCKS, tied=False))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, place: Place) -> Path:
    """A checkpoint with a trained language model and a trained scalar-headed one."""
    directory = tmp_path_factory.mktemp("fp8") / "run"
    parts = {part: (head, shape) for head, part, shape in HEADS.values()}
    return write(directory, parts, place.world / "tokenizer")


@pytest.fixture(scope="module", params=["full", "layers"])
def exported(request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / request.param
    assert export.run(load("export", checkpoint=trained, out=out, dtype="fp8", proof=request.param)) == 0
    return out


def exact(trained: Path, part: str = "model") -> dict[str, torch.Tensor]:
    held = sources.locate(trained, part).tensors()
    found = {name: held.whole(name).float() for name in held.names()}
    held.close()
    return found


def test_the_proof_bounds_every_weight(exported: Path, trained: Path) -> None:
    proof = json.loads((exported / "proof.json").read_text())
    assert proof["dtype"] == "fp8"
    said = proof["fp8"]
    assert 0.05 < said["max_relative_error"] <= said["max_relative_error_bound"] * 1.0001 == pytest.approx(0.0625, 1e-3)
    assert said["max_error_over_largest_of_block"] < 0.036
    if proof["method"] == "full":
        assert 0.995 < proof["cosine"] < 1.0
        assert proof["top1_agreement"] > 0.8
    else:
        assert 1e-3 < proof["largest_relative_difference"] < 0.15
    # What it says is what lies there, measured here on its own.
    wanted, worst = exact(trained), 0.0
    back = block_fp8.Dequantised(HfTensors(exported))
    for name, tensor in wanted.items():
        if block_fp8.is_quantised(name):
            error = (back.whole(name) - tensor).abs() / tensor.abs().amax()
            worst = max(worst, float(error.max()))
        else:
            assert torch.equal(back.whole(name), tensor.to(torch.bfloat16))
    assert 0 < worst <= said["max_error_over_largest_of_block"] * 1.0001


def test_the_files_are_those_of_qwen3s_own_fp8(exported: Path) -> None:
    tensors = {name: value for file in exported.glob("*.safetensors") for name, value in load_file(file).items()}
    matrices = [name for name in qwen3_map.hf_shapes(BLOCKS, "lm") if block_fp8.is_quantised(name)]
    assert len(matrices) == 7 * BLOCKS.num_layers
    for name in matrices:
        rows, columns = tensors[name].shape
        assert tensors[name].dtype is torch.float8_e4m3fn
        scale = tensors.pop(f"{name.removesuffix('.weight')}.weight_scale_inv")
        assert scale.dtype is torch.float32
        assert scale.shape == (rows // 128, columns // 128)
        tensors.pop(name)
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert sorted([*tensors, *matrices]) == sorted(qwen3_map.hf_shapes(BLOCKS, "lm"))
    config = json.loads((exported / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    assert config["torch_dtype"] == "bfloat16"


def test_several_files_and_the_scalar_head(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "reward"
    values = {"checkpoint": trained, "part": "critic", "out": out, "dtype": "fp8", "shard_bytes": 200_000}
    assert export.run(load("export", **values)) == 0
    index = json.loads((out / INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) > 1
    held = HfTensors(out)
    assert not held.problems
    assert index["metadata"]["total_size"] == sum(
        held.whole(name).numel() * held.whole(name).element_size() for name in held.names()
    )
    assert held.dtype("score.weight") is torch.bfloat16
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == ["score"]
    with pytest.raises(UserError, match="quantised; start from the same model in bf16"):
        Qwen3Shape.from_hf_dir(out)


@pytest.mark.parametrize("spoiled", ["a scale", "rows swapped"])
def test_what_is_not_rounding_is_refused(
    spoiled: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = block_fp8.quantise

    def wrong(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers, scales = right(rows)
        if spoiled == "a scale":
            return numbers, scales * 1.07
        turned = numbers.clone()
        turned[[0, 1]] = numbers[[1, 0]]
        return turned, scales

    monkeypatch.setattr(block_fp8, "quantise", wrong)
    with pytest.raises(UserError, match=r"differ by more than rounding to e4m3: model\.layers\.0"):
        export.run(load("export", checkpoint=trained, out=tmp_path / "out", dtype="fp8", proof="layers"))
    assert not (tmp_path / "out").exists()


def test_sizes_that_blocks_do_not_divide_are_refused_beforehand(tmp_path: Path, place: Place) -> None:
    directory = write(tmp_path / "run", {"model": ("lm", replace(SHAPE, num_layers=1))}, place.world / "tokenizer")
    config = load("export", checkpoint=directory, out=tmp_path / "out", dtype="fp8")
    shape = ["num_layers=1", "hidden_size=48", "ffn_hidden_size=80", "num_attention_heads=4", "num_query_groups=2",
             "kv_channels=16"]  # fmt: skip
    config = compose.load(
        "export", [f"checkpoint={directory}", f"out={tmp_path / 'out'}", "dtype=fp8", *[f"model.{k}" for k in shape]]
    )
    said = [problem.message for problem in preflight.check(config) if problem.key == "dtype"]
    assert len(said) == 4
    assert all("no multiple of it" in line for line in said)


def test_transformers_loads_it(exported: Path, trained: Path) -> None:
    """transformers has no FP8 on a CPU: it dequantises to bf16 as it loads."""
    pytest.importorskip("accelerate", reason="transformers wants accelerate for FP8 files")
    from transformers import Qwen3ForCausalLM

    network, info = Qwen3ForCausalLM.from_pretrained(exported, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    back = block_fp8.Dequantised(HfTensors(exported))
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, back.whole(name).to(torch.bfloat16)), name
