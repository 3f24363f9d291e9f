"""`her-nemo plan`: what a configuration needs on its cluster, what would make it fit, and which layouts are fastest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from her_nemo.config import compose, partial
from her_nemo.config.errors import ConfigErrors, UserError
from her_nemo.config.schema import PpoConfig, SftConfig, SftModel
from her_nemo.config.sections import Trainer
from her_nemo.planning import calibration as cal
from her_nemo.planning import command, memory, search, stages
from her_nemo.planning.shapes import Layout, Shape, total_parameters

ROOT = Path(__file__).resolve().parents[2]
EIGHT = ["model=qwen3_8b", "cluster=h100_1x8", "precision=bf16", "model.tensor_model_parallel_size=2"]
LARGE = [
    "model=qwen3_32b",
    "precision=bf16",
    "model.global_batch_size=64",
    "model.ppo.num_rollout_samples=64",
]
SEARCHED = ("cluster=h100_4x8",)


def answer(stage: str, *overrides: str, **options) -> command.Answer:
    return command.answer_for(stage, list(overrides), **options)


def shape_of(config) -> Shape:
    return Shape.from_architecture(config.model.architecture())


def test_phases_of_sft_add_up() -> None:
    found = answer("sft", *EIGHT)
    assert found.problems == []
    assert found.to_give == ["model.data.train_ds.file_path", "pretrained_checkpoint.restore_from_path"]
    plan = found.plan
    held = plan.parts["model"]
    assert [phase.name for phase in plan.phases] == ["load", "train", "train: step", "save"]
    assert all(phase.total == phase.static + phase.passing + phase.overhead for phase in plan.phases)
    assert all(phase.static == held.total for phase in plan.phases)
    assert plan.layout == Layout(2, 1, 4)
    # bf16: two bytes of weights, two of gradients, and twelve of optimizer states over four replicas; norms on both.
    elements = total_parameters(shape_of(partial.load("sft", EIGHT)[0]))
    assert held.weights == held.gradients == pytest.approx(elements / 2 * 2, rel=1e-3)
    assert held.optimizer == pytest.approx(elements / 2 * 12 / 4, rel=1e-3)
    assert plan.headroom == int(cal.GPUS["h100_80gb"].memory * cal.USABLE_SHARE) - plan.peak.total
    assert plan.tokens_per_second_per_gpu == pytest.approx(8 * 4096 / plan.step_seconds / 8)


def test_ppo_keeps_four_models_and_names_its_phases() -> None:
    found = answer(
        "ppo",
        *LARGE,
        "cluster=h100_8x8",
        "model.tensor_model_parallel_size=8",
        "model.sequence_parallel=true",
    )
    assert list(found.plan.parts) == ["actor", "critic", "reference", "reward model"]
    assert found.plan.parts["reference"].gradients == found.plan.parts["reference"].optimizer == 0
    names = [phase.name for phase in found.plan.phases]
    assert names == ["load", "rollout", "scoring", "critic update", "critic update: step", "actor update",
                     "actor update: step", "save", "sync"]  # fmt: skip
    assert found.plan.peak.total == max(phase.total for phase in found.plan.phases)


def test_a_judge_s_checkpoint_is_one_model_more() -> None:
    given = [*LARGE, "cluster=h100_8x8", "reward.kind=generative"]
    config = partial.load("ppo", [*given, "reward.generative.judge.restore_from_path=/judge"])[0]
    parts = stages.plan(config, shape_of(config)).parts
    assert list(parts) == ["actor", "critic", "reference", "judge"]
    assert parts["judge"] == parts["reference"]
    config = partial.load("ppo", [*given, "reward.generative.judge.servers=['http://a/v1']"])[0]
    assert "judge" not in stages.plan(config, shape_of(config)).parts


def test_memory_falls_with_what_ought_to_lower_it() -> None:
    def peak(*overrides: str) -> int:
        config = compose.load("sft", ["pretrained_checkpoint.restore_from_path=/x", "model.data.train_ds.file_path=/x",
                                      *EIGHT, "model.micro_batch_size=2", *overrides])  # fmt: skip
        assert isinstance(config, SftConfig)
        return stages.plan(config, shape_of(config)).peak.total

    plain = peak()
    full = ["model.activations_checkpoint_granularity=full", "model.activations_checkpoint_method=uniform",
            "model.activations_checkpoint_num_layers=1"]  # fmt: skip
    for overrides in (["model.sequence_parallel=true"], full, ["model.micro_batch_size=1"],
                      ["model.encoder_seq_length=2048"],
                      ["model.tensor_model_parallel_size=4"]):  # fmt: skip
        assert peak(*overrides) < plain, overrides
    assert peak("precision=fp32") > plain
    assert peak("trainer.precision=bf16-mixed") > plain
    assert peak("model.optim.name=fused_adam") > plain


def test_first_and_last_stage_are_both_looked_at() -> None:
    layout = Layout(pipeline=4)
    shape = Shape(8, 64, 96, 4, 2, 16, 50_000)
    common = {"sequence": 128, "batch": 1, "precision": "bf16"}
    first, _ = memory.stage_activations(shape, layout, 0, **common)
    last, _ = memory.stage_activations(shape, layout, 3, **common)
    assert memory.in_flight(layout, 0, 16) == 4
    assert memory.in_flight(layout, 0, 2) == 2
    assert memory.in_flight(layout, 3, 16) == 1
    assert last > first  # the vocabulary's probabilities


def test_key_value_cache_by_hand() -> None:
    shape = Shape(36, 4096, 12288, 32, 8, 128, 151936)
    size = memory.kv_cache_bytes(
        shape, Layout(tensor=4, pipeline=2), sequences=16, length=4096, precision="bf16"
    )
    assert size == 2 * 18 * 16 * 4096 * (8 // 4) * 128 * 2


def test_what_does_not_fit_is_answered_with_changes_that_do() -> None:
    found = answer(
        "sft",
        *EIGHT,
        "model.tensor_model_parallel_size=1",
        "model.micro_batch_size=8",
        "model.global_batch_size=64",
    )
    assert not found.fits
    assert found.exit_code == 2
    assert len(found.fixes) == 3
    config = partial.load("sft", [*EIGHT, "model.tensor_model_parallel_size=1", "model.micro_batch_size=8",
                                  "model.global_batch_size=64"])[0]  # fmt: skip
    for option in found.fixes:
        changed = search.with_keys(config, option.changes)
        assert stages.plan(changed, shape_of(config)).headroom >= 0
        # The overrides as they are shown do the same from the command line.
        again = answer("sft", *EIGHT, "model.tensor_model_parallel_size=1", "model.micro_batch_size=8",
                       "model.global_batch_size=64", *option.overrides.split())  # fmt: skip
        assert again.fits, option.overrides
        assert again.problems == [], option.overrides


def test_the_search_finds_layouts_that_preflight_accepts() -> None:
    found = answer("ppo", *LARGE, *SEARCHED, search_layouts=True)
    assert 1 <= len(found.found) <= 5
    times = [option.plan.step_seconds for option in found.found]
    assert times == sorted(times)
    for option in found.found:
        again = answer("ppo", *LARGE, *SEARCHED, *option.overrides.split())
        assert again.problems == [], option.overrides
        assert again.fits
        assert again.plan.step_seconds == pytest.approx(option.plan.step_seconds)
        assert "% of the step is" in option.why()


def test_fp8_is_looked_at_when_asked_for_and_where_there_is_some() -> None:
    given = ["model=qwen3_32b", "precision=bf16", "model.global_batch_size=64", *SEARCHED]
    if "fp8" not in SftModel.model_fields:
        with pytest.raises(UserError, match=r"no model\.fp8"):
            command.main(["sft", *given, "--search", "--fp8"])
        return
    plain = answer("sft", *given, search_layouts=True)
    both = answer("sft", *given, search_layouts=True, fp8=True)
    assert not any(option.changes.get("model.fp8") for option in plain.found)
    assert both.found[0].changes["model.fp8"]
    assert both.found[0].plan.step_seconds < plain.found[0].plan.step_seconds
    with pytest.raises(UserError, match="A100 80 GB SXM has no FP8"):
        answer("sft", *given, "cluster=a100_8x8", search_layouts=True, fp8=True)


def test_fp8_goes_with_search() -> None:
    with pytest.raises(UserError, match="goes with --search"):
        command.main(["sft", "--fp8"])


def test_a_wrong_layout_is_a_problem_not_a_plan() -> None:
    found = answer("sft", *EIGHT, "model.tensor_model_parallel_size=3")
    assert found.plan is None
    assert {problem.key for problem in found.problems} >= {
        "model.tensor_model_parallel_size",
        "trainer.devices",
    }
    assert found.exit_code == 2


def test_without_a_shape_it_says_what_to_add() -> None:
    found = answer("sft", "cluster=h100_1x8")
    assert found.plan is None
    assert any("model=qwen3_8b" in note for note in found.notes)
    assert answer("evaluate").notes


def test_a_mean_length_shortens_times_and_leaves_memory() -> None:
    long, short = answer("sft", *EIGHT), answer("sft", *EIGHT, length=1024.0)
    assert short.plan.step_seconds < long.plan.step_seconds / 3
    assert short.plan.peak.total == long.plan.peak.total


def test_every_gpu_of_the_schema_is_known() -> None:
    literal = Trainer.model_fields["gpu"].annotation
    assert {name for name in str(literal).split("'") if name in cal.GPUS} == set(cal.GPUS)
    groups = [file.stem for file in (compose.conf_dir() / "cluster").glob("*x8.yaml")]
    assert len(groups) >= 8
    for group in groups:
        config = partial.load("ppo", [f"cluster={group}"])[0]
        assert isinstance(config, PpoConfig)
        kind, size = group.split("_")
        assert (config.trainer.num_nodes, config.trainer.devices) == tuple(map(int, size.split("x")))
        assert config.trainer.gpu.startswith(kind)


def test_a_word_of_a_few_that_was_not_given_is_asked_for() -> None:
    with pytest.raises(ConfigErrors) as caught:
        command.main(["data", "synthesise", "out=x", "limits.retries=many"])
    found = {problem.key: problem.message for problem in caught.value.problems}
    assert found["stage"] == "has to be given"
    assert "wanted a whole number" in found["limits.retries"]
    given = ["stage=all", "source=/no", "out=x", "endpoint=http://h/v1"]
    assert command.main(["data", "synthesise", *given]) == 2  # model is still to give, source is not there


def test_arguments() -> None:
    with pytest.raises(UserError, match="whole number"):
        command.main(["sft", "--length", "many"])
    with pytest.raises(UserError, match="no option"):
        command.main(["sft", "--fast"])
    with pytest.raises(UserError, match="did you mean 'sft'"):
        command.main(["sfft"])
    with pytest.raises(ConfigErrors, match=r"trainer\.devices"):
        command.main(["sft", "trainer.devices=two"])


def test_the_command_answers_in_text_and_json_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["sft", *EIGHT, "trainer.sft.max_steps=100"]) == 0
    text = capsys.readouterr().out
    for words in (
        "preflight of sft: nothing wrong",
        "8.19 B parameters on 8 x H100",
        "GB free",
        "GPU hours",
        "still to give",
    ):
        assert words in text
    assert command.main(["sft", *EIGHT, "--strict"]) == 2
    assert "has to be given" in capsys.readouterr().out
    program = (
        "import sys; from her_nemo.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code if not {'torch', 'transformers', 'megatron'} & set(sys.modules) else 99)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", "sft", *EIGHT, "--json"], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["ok"]
    assert body["fits"]
    assert body["plan"]["peak"]["bytes"] == max(phase["total"] for phase in body["plan"]["phases"])
    assert body["plan"]["headroom_bytes"] == body["plan"]["usable_bytes"] - body["plan"]["peak"]["bytes"]
