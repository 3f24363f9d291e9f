"""What FP8 lacks is said before anything starts: why, and what to change. And what the planner makes of it."""

from __future__ import annotations

import pytest

from her_nemo.config import compose
from her_nemo.config.schema import SftConfig
from her_nemo.planning import memory, preflight, search, stages, timing
from her_nemo.planning.calibration import GPUS
from her_nemo.planning.shapes import Layout, Shape
from her_nemo.planning.timing import Machine, Work

GIVEN = ["pretrained_checkpoint.restore_from_path=/x", "model.data.train_ds.file_path=/x"]
FP8 = "model.fp8"
RECIPE = "model.fp8_recipe"


def config(*overrides: str, stage: str = "sft") -> SftConfig:
    more = ["reward.restore_from_path=/x"] if stage == "ppo" else []
    return compose.load(stage, [*GIVEN, *more, *overrides])


def found(*overrides: str, stage: str = "sft") -> dict[str, str]:
    """Problems by key, those of the files that are not there left out."""
    said: dict[str, str] = {}
    for problem in preflight.check(config(*overrides, stage=stage)):
        if "/x" not in problem.message:
            said[problem.key] = said.get(problem.key, "") + str(problem)
    return said


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=fp8", "cluster=h100_1x8", "model=qwen3_8b"],
        ["precision=fp8_tensorwise", "cluster=h100_1x8", "model=qwen3_32b", "model.tensor_model_parallel_size=8",
         "model.sequence_parallel=true"],
        ["precision=fp8_blockwise", "cluster=h200_1x8", "model=qwen3_0_6b"],
        ["precision=fp8", "trainer.accelerator=gpu", "model=qwen3_tiny", "model.encoder_seq_length=2048"],
        ["precision=fp8", f"{RECIPE}=mxfp8", "trainer.accelerator=gpu", "model=qwen3_4b"],
        ["precision=fp8", "cluster=h100_1x8", "model=qwen3_8b", "model.fp8_params=true"],
        ["precision=bf16_mixed"],
        ["precision=fp8", "cluster=h100_1x8"],
    ],
)  # fmt: skip
def test_nothing_is_wrong_where_fp8_can_run(overrides: list[str]) -> None:
    assert found(*overrides) == {}


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["precision=fp8"], FP8, "cluster=local names no GPU"),
        (["precision=fp8"], FP8, "cluster=h100_1x8"),
        (["precision=fp8", "trainer.accelerator=cpu"], FP8, "FP8 tensor cores; trainer.accelerator=cpu"),
        (["precision=fp8", "cluster=a100_1x8"], FP8, "Ampere, which has no FP8 (delayed needs Ada, Hopper or newer)"),
        (["precision=fp8_blockwise", "cluster=a100_1x8"], FP8, "blockwise needs Hopper or newer"),
        (["precision=fp8", f"{RECIPE}=mxfp8", "cluster=h100_1x8"], RECIPE, "mxfp8 needs Blackwell; trainer.gpu="),
        (["precision=fp8", f"{RECIPE}=mxfp8", "cluster=h200_1x8"], RECIPE, "is Hopper"),
        (["precision=fp8", "cluster=h100_1x8", "trainer.precision='32'"], "trainer.precision", "bf16-mixed"),
        (["precision=fp8", "cluster=h100_1x8", "model.transformer_engine=false"], "model.transformer_engine",
         "goes through Transformer Engine"),
        (["precision=fp8", "cluster=h100_1x8", "model.fp8_e4m3=true", "model.fp8_hybrid=true"], "model.fp8_e4m3",
         "both true"),
        (["precision=fp8", "cluster=h100_1x8", "model=qwen3_tiny", "model.ffn_hidden_size=200",
          "model.encoder_seq_length=64"], FP8, "ffn_hidden_size / TP = 200 on each rank is not a multiple of 16"),
        # 96 fits whole, a fourth of it does not.
        (["precision=fp8", "cluster=h100_1x8", "model=qwen3_tiny", "model.ffn_hidden_size=96",
          "model.num_query_groups=4", "model.tensor_model_parallel_size=4", "model.encoder_seq_length=64"], FP8,
         "ffn_hidden_size / TP = 24"),
        (["precision=fp8", "cluster=h100_1x8", "model=qwen3_tiny", "model.num_attention_heads=3",
          "model.num_query_groups=1", "model.kv_channels=24", "model.encoder_seq_length=64"], FP8,
         "attention width / TP = 72"),
        (["precision=fp8", f"{RECIPE}=mxfp8", "trainer.accelerator=gpu", "model=qwen3_tiny", "model.hidden_size=144",
          "model.encoder_seq_length=64"], FP8, "hidden_size = 144 on each rank is not a multiple of 32"),
        (["precision=fp8", "cluster=h100_1x8", "model.encoder_seq_length=1000"], "model.encoder_seq_length",
         "use model.encoder_seq_length=1008"),
        (["precision=fp8", "cluster=h100_1x8", "model.encoder_seq_length=48", "model=qwen3_8b",
          "model.tensor_model_parallel_size=4", "model.sequence_parallel=true"], "model.encoder_seq_length",
         "not a multiple of 64"),
        (["precision=fp8", "cluster=h100_1x8", "model.first_last_layers_bf16=true"], "model.first_last_layers_bf16",
         "one history for the whole model"),
        (["precision=fp8_tensorwise", "cluster=h100_1x8", "model=qwen3_8b", "model.pipeline_model_parallel_size=4",
          "model.num_layers_at_start_in_bf16=10"], "model.num_layers_at_start_in_bf16", "9 layers of a pipeline stage"),
        (["precision=fp8", "cluster=h100_1x8", "model.fp8_params=true", "model.optim.name=fused_adam"],
         "model.optim.name", "distributed_fused_adam"),
        (["precision=fp8", f"{RECIPE}=mxfp8", "trainer.accelerator=gpu", "model.fp8_params=true"], "model.fp8_params",
         "not built"),
        (["model.fp8_params=true"], "model.fp8_params", "set model.fp8=true"),
        (["model.fp8_e4m3=true"], "model.fp8_e4m3", "has an effect with model.fp8 only"),
    ],
)  # fmt: skip
def test_each_problem(overrides: list[str], key: str, words: str) -> None:
    problems = found(*overrides)
    assert list(problems) == [key], problems
    assert words in problems[key]


def test_the_critics_optimizer_is_looked_at_too() -> None:
    changes = ["precision=fp8", "cluster=h100_1x8", "model.fp8_params=true", "critic.optim.name=fused_adam"]
    said = found(*changes, stage="ppo")
    assert "critic.optim.name" in said


def test_all_at_once() -> None:
    said = found("precision=fp8_blockwise", "cluster=a100_1x8", "trainer.precision='32'", "model.fp8_e4m3=true",
                 "model.fp8_hybrid=true", "model.encoder_seq_length=1001")  # fmt: skip
    assert set(said) == {FP8, "trainer.precision", "model.fp8_e4m3", "model.encoder_seq_length"}


# ---------------------------------------------------------------- the planner

SHAPE = Shape(36, 4096, 12288, 32, 8, 128, 151936)
H100 = Machine(GPUS["h100_80gb"])


def plan_of(*overrides: str) -> stages.StagePlan:
    made = config("cluster=h100_1x8", "model=qwen3_8b", "model.encoder_seq_length=4096", *overrides)
    return stages.plan(made, SHAPE)


def test_fp8_is_faster_and_costs_memory_for_its_copies() -> None:
    half, fp8 = plan_of("precision=bf16_mixed"), plan_of("precision=fp8")
    assert 0.5 < fp8.step_seconds / half.step_seconds < 0.85
    matrices = SHAPE.layer_matrix_elements * SHAPE.num_layers
    extra = fp8.parts["model"].weights - half.parts["model"].weights
    assert extra == 2 * matrices
    # Weights kept in FP8 are those copies, so bf16's bytes go again.
    kept = plan_of("precision=fp8", "model.fp8_params=true")
    assert kept.parts["model"].weights == half.parts["model"].weights
    assert kept.parts["model"].optimizer == half.parts["model"].optimizer


def test_layers_in_bf16_take_bf16s_time() -> None:
    layout, run = Layout(data=8), {"sequences": 64, "length": 4096.0}
    half = timing.train_step(Work(SHAPE, layout, H100), **run).matrices
    fp8 = timing.train_step(Work(SHAPE, layout, H100, fp8=True), **run).matrices
    none = timing.train_step(Work(SHAPE, layout, H100, fp8=True, fp8_share=0.0), **run).matrices
    some = timing.train_step(Work(SHAPE, layout, H100, fp8=True, fp8_share=0.5), **run).matrices
    assert none == pytest.approx(half)
    assert some == pytest.approx((half + fp8) / 2)


def test_activations_keep_inputs_of_matrices_in_one_byte() -> None:
    sizes = {"sequence": 1024, "batch": 1, "precision": "bf16", "kernels": memory.Kernels.FUSED}
    half = memory.layer_activations(SHAPE, Layout(), **sizes)
    fp8 = memory.layer_activations(SHAPE, Layout(), fp8=True, **sizes)
    # Two norms' outputs and SwiGLU's go from two bytes to one; the attention's output gets a copy.
    assert fp8 - half == 1024 * (-2 * SHAPE.hidden_size + SHAPE.query_width - SHAPE.ffn_hidden_size)


def test_search_keeps_to_layouts_that_fp8_takes() -> None:
    """Of 96 features of a feed-forward, TP 8 leaves 12 a rank: no multiple of 16."""
    small = Shape(4, 128, 96, 8, 8, 16, 1152, tied=True)
    made = config("cluster=h100_1x8", "precision=fp8", "model.encoder_seq_length=64", "model.global_batch_size=8")
    tensor = {option.changes[search.TP] for option in search.layouts(made, small, best=20)}
    without = config("cluster=h100_1x8", "model.encoder_seq_length=64", "model.global_batch_size=8")
    assert 8 in {option.changes[search.TP] for option in search.layouts(without, small, best=20)}
    assert tensor == {1, 2}
