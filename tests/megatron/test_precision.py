"""What the precision keys become in megatron-core's configurations, and what FP8 changes around the model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from safetensors.torch import save_file
from tiny import TINY

from her_nemo.config import compose
from her_nemo.config.errors import UserError
from her_nemo.config.precision import Fp8Keys
from her_nemo.megatron import decoding, forward, fp8_state, optimizer, platform, precision, qwen3, state
from her_nemo.megatron.precision import Fp8, Precision
from her_nemo.planning import precision_checks

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")


def from_keys(*overrides: str) -> Precision:
    given = ["pretrained_checkpoint.restore_from_path=/x", "model.data.train_ds.file_path=/x", *overrides]
    config = compose.load("sft", given)
    return precision.from_config(config.trainer.precision, config.model)


@pytest.fixture
def plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models with FP8's configuration and our own layers, which compute without it: there is no GPU to do it on."""
    monkeypatch.setattr(Precision, "fused", property(lambda self: False))


def test_recipes_are_megatron_cores() -> None:
    ours = set(Fp8Keys.model_fields["fp8_recipe"].annotation.__args__)
    assert ours == {recipe.value for recipe in Fp8Recipe} - {"custom"} == set(precision_checks.NEEDS)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["model.fp8=true"], {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1024,
                              "fp8_amax_compute_algo": "max", "fp8_margin": 0, "fp8_param": False,
                              "first_last_layers_bf16": False}),
        (["model.fp8=true", "model.fp8_e4m3=true", "model.fp8_margin=2", "model.fp8_amax_history_len=16",
          "model.fp8_amax_compute_algo=most_recent", "model.fp8_params=true"],
         {"fp8": "e4m3", "fp8_margin": 2, "fp8_amax_history_len": 16, "fp8_amax_compute_algo": "most_recent",
          "fp8_param": True}),
        (["model.fp8=true", "model.fp8_hybrid=true", "model.fp8_recipe=blockwise"],
         {"fp8": "hybrid", "fp8_recipe": "blockwise"}),
        (["model.fp8=true", "model.fp8_recipe=mxfp8"], {"fp8": "e4m3", "fp8_recipe": "mxfp8"}),
        (["precision=fp8_blockwise"], {"fp8": "e4m3", "fp8_recipe": "blockwise", "params_dtype": torch.bfloat16}),
        (["model.fp8=true", "model.fp8_recipe=tensorwise", "model.first_last_layers_bf16=true",
          "model.num_layers_at_start_in_bf16=2", "model.num_layers_at_end_in_bf16=0"],
         {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 0}),
        (["precision=fp8_tensorwise"], {"fp8_recipe": "tensorwise", "num_layers_at_start_in_bf16": 1,
                                        "num_layers_at_end_in_bf16": 1}),
        ([], {"fp8": None, "fp8_param": False, "bf16": True}),
    ],
)  # fmt: skip
def test_keys_reach_the_transformers_configuration(overrides: list[str], wanted: dict, plain_layers: None) -> None:
    settings = from_keys("trainer.precision=bf16-mixed", *overrides)
    config = qwen3.transformer_config(replace(TINY, num_layers=4), settings=settings)
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert (config.params_dtype, config.pipeline_dtype, config.bf16) == (torch.bfloat16, torch.bfloat16, True)


@pytest.mark.parametrize("params", [False, True])
def test_keys_reach_gradients_and_optimizer(params: bool, plain_layers: None) -> None:
    settings = from_keys("trainer.precision=bf16", "model.fp8=true", f"model.fp8_params={str(params).lower()}",
                         "model.fp8_recipe=tensorwise")  # fmt: skip
    model = qwen3.build(TINY, dtype=settings, distributed_optimizer=True)
    ddp = model.chunks[0].ddp_config
    assert (ddp.fp8_param_gather, ddp.grad_reduce_in_fp32) == (params, False)
    stepped = optimizer.optimizer(model, lr=1e-3)
    assert (stepped.config.fp8_recipe, stepped.config.bf16) == ("tensorwise", True)
    assert model.precision.name == "bf16"


def test_without_fp8_nothing_is_other_than_it_was() -> None:
    model = qwen3.build(TINY, dtype="bf16-mixed")
    assert model.config.fp8 is None
    assert not model.chunks[0].ddp_config.fp8_param_gather
    assert optimizer.optimizer(model, lr=1e-3).config.fp8_recipe is None
    assert from_keys("trainer.precision=bf16") == precision.precision("bf16")
    assert from_keys() == precision.precision("32")


@ON_CPU
@pytest.mark.parametrize("key", ["model.fp8=true", "model.transformer_engine=true"])
def test_what_needs_transformer_engine_says_so(key: str) -> None:
    settings = from_keys("trainer.precision=bf16", key)
    with pytest.raises(UserError, match=f"{key.removesuffix('=true')}.* needs Transformer Engine on a GPU"):
        qwen3.build(TINY, dtype=settings)


def test_a_gpu_without_transformer_engine_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(platform, "has_transformer_engine", lambda: False)
    with pytest.raises(UserError, match="importing it fails: No module named 'transformer_engine'"):
        platform.require_transformer_engine("model.fp8")


def test_fp32_keeps_its_own_layers_where_transformer_engine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine multiplies fp32 matrices in TF32."""
    monkeypatch.setattr(platform, "has_transformer_engine", lambda: True)
    assert not from_keys("trainer.precision=32").fused
    assert from_keys("trainer.precision=32", "model.transformer_engine=true").fused
    assert from_keys("trainer.precision=bf16").fused
    assert not from_keys("trainer.precision=bf16", "model.transformer_engine=false").fused
    assert from_keys("trainer.precision=bf16", "model.fp8=true").fused


@pytest.mark.parametrize(
    ("recipe", "capability", "fits"),
    [("delayed", (8, 0), False), ("delayed", (8, 9), True), ("blockwise", (8, 9), False), ("blockwise", (9, 0), True),
     ("mxfp8", (9, 0), False), ("mxfp8", (10, 0), True)],
)  # fmt: skip
def test_the_gpu_at_hand_must_have_the_recipe(recipe: str, capability: tuple[int, int], fits: bool) -> None:
    settings = replace(precision.precision("bf16"), fp8=Fp8("hybrid", recipe))
    if fits:
        precision.check_device(settings, capability)
    else:
        with pytest.raises(UserError, match=f"{recipe} needs .* compute capability {capability[0]}"):
            precision.check_device(settings, capability)


@pytest.mark.parametrize(
    ("recipe", "rows", "unit"), [("delayed", 1, 16), ("delayed", 4, 4), ("delayed", 3, 16), ("delayed", 32, 1),
                                 ("mxfp8", 1, 32), ("mxfp8", 2, 16), ("blockwise", 8, 2)]
)  # fmt: skip
def test_padding_makes_the_tokens_a_multiple(recipe: str, rows: int, unit: int) -> None:
    settings = replace(precision.precision("bf16"), fp8=Fp8("hybrid", recipe))
    assert settings.multiple(rows) == unit
    assert rows * unit % precision_checks.multiple_of(recipe) == 0
    assert precision.precision("bf16").multiple(rows) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_are_padded_and_say_the_same(packed: bool, plain_layers: None) -> None:
    fp8 = Precision("32", torch.float32, grad_reduce_in_fp32=True, fp8=Fp8("hybrid", "delayed"))
    batch: dict[str, torch.Tensor] = {"tokens_BS": torch.randint(0, TINY.vocab_size, (1 if packed else 2, 21))}
    if packed:
        batch["cu_seqlens"] = torch.tensor([0, 8, 21], dtype=torch.int32)
    lengths: list[int] = []
    said = []
    for settings in (precision.precision("32"), fp8):
        torch.manual_seed(2)
        model = qwen3.build(TINY, dtype=settings, trainable=False)
        model.bare().register_forward_pre_hook(
            lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        said.append(forward.log_probs(model, [batch])[0])
    assert lengths == [21, 32 if packed else 24]
    assert said[0].shape == said[1].shape == batch["tokens_BS"][:, 1:].shape
    assert torch.allclose(*said, atol=1e-5)


def test_decoding_is_in_bf16(plain_layers: None) -> None:
    settings = replace(precision.precision("bf16"), fp8=Fp8("hybrid", "delayed"))
    model = qwen3.build(TINY, dtype=settings, trainable=False)
    with decoding.decoding(model):
        assert all(getattr(module, "config", model.config).fp8 is None for module in model.bare().modules())
    assert model.config.fp8 == "hybrid"


# ---------------------------------------------------------------- weights and states that Transformer Engine keeps


def test_the_optimizer_starts_from_what_was_loaded() -> None:
    """An FP8 parameter offers the optimizer the values of its initialisation: they must become the loaded ones."""
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    parameter._high_precision_init_val = torch.full((3, 2), 9.0)
    loaded = torch.arange(6.0).view(3, 2)
    precision.fill(parameter, loaded)
    assert torch.equal(parameter, loaded)
    assert torch.equal(parameter._high_precision_init_val, loaded)
    loaded.zero_()
    assert parameter._high_precision_init_val.sum() == 15
    parameter.clear_high_precision_init_val = lambda: delattr(parameter, "_high_precision_init_val")
    precision.forget(parameter)
    assert not hasattr(parameter, "_high_precision_init_val")
    ordinary = torch.nn.Parameter(torch.zeros(2))
    precision.fill(ordinary, torch.ones(2))
    assert not hasattr(ordinary, "_high_precision_init_val")


def test_fp8_parameters_are_exported_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quantised(torch.Tensor):
        """Numbers with a scale, as Transformer Engine's tensors are."""

        def dequantize(self) -> torch.Tensor:
            return self.as_subclass(torch.Tensor) * 4.0

    held = torch.ones(2, 2).as_subclass(Quantised)
    monkeypatch.setattr(precision, "is_float8tensor", lambda tensor: isinstance(tensor, Quantised))
    monkeypatch.setattr(precision, "dequantize_fp8_tensor", lambda tensor: tensor.dequantize())
    assert torch.equal(precision.plain(held), torch.full((2, 2), 4.0))
    assert torch.equal(precision.plain(torch.nn.Parameter(torch.ones(2))), torch.ones(2))


@dataclass
class Meta:
    """The two tensors of Transformer Engine's DelayedScalingRecipeState."""

    scale: torch.Tensor
    amax_history: torch.Tensor


@dataclass
class Recipe:
    amax_history_len: int = 4
    asked: list[Any] = field(default_factory=list)


class Fp8Linear(torch.nn.Linear):
    """A linear map that keeps FP8 states where Transformer Engine's modules keep theirs."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.fp8_meta: dict[str, Any] = {}

    def init_fp8_meta_tensors(self, recipe: Recipe) -> None:
        for side, per_product in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            width = per_product * self.fp8_meta["num_gemms"]
            self.fp8_meta[side] = Meta(torch.ones(width), torch.zeros(recipe.amax_history_len, width))


def test_scales_and_histories_survive_a_checkpoint() -> None:
    ran = torch.nn.Sequential(Fp8Linear(), torch.nn.ReLU(), Fp8Linear())
    for module in ran[::2]:
        module.fp8_meta["num_gemms"] = 1
        module.init_fp8_meta_tensors(Recipe())
        for side in ("scaling_fwd", "scaling_bwd"):
            module.fp8_meta[side].scale.uniform_(1, 100)
            module.fp8_meta[side].amax_history.uniform_(0, 5)
    saved = fp8_state.collect(ran)
    assert len(saved) == 8
    fresh = torch.nn.Sequential(Fp8Linear(), torch.nn.ReLU(), Fp8Linear())
    assert fp8_state.restore(fresh, saved, Recipe()) == 2
    again = fp8_state.collect(fresh)
    assert all(torch.equal(again[name], saved[name]) for name in saved)
    assert fresh[0].fp8_meta["num_gemms"] == 1
    longer = torch.nn.Sequential(Fp8Linear(), torch.nn.ReLU(), Fp8Linear())
    assert fp8_state.restore(longer, saved, Recipe(amax_history_len=8)) == 0
    assert longer[0].fp8_meta["scaling_fwd"].amax_history.sum() == 0


def test_a_run_without_fp8_goes_on_from_one_with_it(tmp_path: Path) -> None:
    model = qwen3.build(TINY)
    state.save(tmp_path / "c", model)
    where = "decoder.layers.0.self_attention.linear_qkv"
    saved = {f"{where}/{side}/{kind}": torch.ones(3) for side in ("scaling_fwd", "scaling_bwd")
             for kind in ("scale", "amax_history")}  # fmt: skip
    save_file(saved, tmp_path / "c" / "fp8_00000.safetensors")
    assert state.load(tmp_path / "c", model) == {}


def test_other_recipes_and_other_modules_have_no_states() -> None:
    module = torch.nn.Sequential(Fp8Linear(), torch.nn.Linear(2, 2))
    module[0].fp8_meta["scaling_fwd"] = SimpleNamespace(scale=torch.ones(3), amax=torch.ones(3))
    assert fp8_state.collect(module) == {}


def test_random_states_of_another_kind_of_device_are_left_out(tmp_path: Path) -> None:
    """A checkpoint of a CPU is continued on a GPU, where generators have states of 16 bytes."""
    model = qwen3.build(TINY)
    state.save(tmp_path / "run", model)
    tracker = state.get_cuda_rng_tracker()
    before = tracker.get_states()
    saved = state._random_state()
    try:
        tracker.set_states({name: torch.zeros(16, dtype=torch.uint8) for name in before})
        state._set_random_state(saved)
        assert all(value.numel() == 16 for value in tracker.get_states().values())
        tracker.set_states({name: value.clone().fill_(1) for name, value in before.items()})
        state._set_random_state(saved)
        assert all(torch.equal(tracker.get_states()[name], before[name]) for name in before)
    finally:
        tracker.set_states(before)
    assert json.loads((tmp_path / "run" / state.ABOUT).read_text())["precision"] == "32"
