"""What preflight finds, case by case: each problem names its key and the change to make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from her_nemo.config import compose
from her_nemo.config.schema import StageConfig
from her_nemo.planning import preflight

TINY = {
    "model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024, "rope_theta": 1e6,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip

TP = "model.tensor_model_parallel_size"
PP = "model.pipeline_model_parallel_size"
PEFT = "model.peft."
START = "pretrained_checkpoint.restore_from_path"
RECOMPUTE = "model.activations_checkpoint_granularity"
GLOBAL_BATCH = "model.global_batch_size"
VALIDATION = "model.data.validation_ds.file_path"
ROLLOUTS = "model.ppo.num_rollout_samples"
MONITOR = "exp_manager.checkpoint_callback_params.monitor"
VLLM, USE_VLLM = "model.ppo.vllm.", "model.ppo.rollout_engine=vllm"
SERVERS = [USE_VLLM, VLLM + "servers=['http://a:8000']"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a Hugging Face config (hf/), a finished Megatron checkpoint (run/) and a data file."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(TINY))
    step = tmp_path / "run" / "checkpoints" / "step_00000010"
    step.mkdir(parents=True)
    (step.parent / "latest").write_text("step_00000010\n")
    shape = {
        "num_layers": 4,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "hidden_size": 128,
        "tied": True,
    }
    (step / "manifest.json").write_text(json.dumps({"models": {"model": {"shape": shape}}}))
    (tmp_path / "data.jsonl").write_text("{}\n")
    return tmp_path


def config(place: Path, stage: str, *overrides: str) -> StageConfig:
    given = {
        "sft": [
            f"pretrained_checkpoint.restore_from_path={place}/hf",
            f"model.data.train_ds.file_path={place}/data.jsonl",
            f"exp_manager.explicit_log_dir={place}/out",
            "model.encoder_seq_length=512",
        ],
        "convert": [f"source={place}/hf", f"out={place}/out"],
        "export": [f"checkpoint={place}/run", f"out={place}/out"],
        "evaluate": [f"model={place}/hf", f"prompts={place}/data.jsonl", f"out={place}/out"],
        "demo": [f"out={place}/out"],
    }
    given["reward"] = given["sft"]
    given["ppo"] = [
        *given["sft"], f"reward.restore_from_path={place}/run", "model.ppo.length_params.max_length=128",
    ]  # fmt: skip
    return compose.load(stage, [*given[stage], *overrides])


def found(place: Path, stage: str, *overrides: str, **environment: str) -> dict[str, str]:
    problems = preflight.check(config(place, stage, *overrides), environment)
    return {problem.key: str(problem) for problem in problems}


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "convert", "export", "evaluate", "demo"])
def test_nothing_is_wrong_with_a_right_configuration(stage: str, place: Path) -> None:
    assert found(place, stage) == {}


@pytest.mark.parametrize(
    ("stage", "overrides", "key", "words"),
    [
        ("sft", ["model.tensor_model_parallel_size=3", "trainer.devices=3"], TP, "does not divide"),
        ("sft", ["model.tensor_model_parallel_size=3", "trainer.devices=3"], TP,
         "num_query_groups = 2\n     -> use model.tensor_model_parallel_size=1 or 2"),
        ("reward", ["model.pipeline_model_parallel_size=3", "trainer.devices=3"], PP,
         "use model.pipeline_model_parallel_size=1 or 2 or 4"),
        ("sft", ["model.tensor_model_parallel_size=2"], "trainer.devices", "use trainer.devices=2"),
        ("sft", ["model.sequence_parallel=true"], "model.sequence_parallel", "needs tensor parallelism"),
        ("sft", ["trainer.devices=2", "model.global_batch_size=6", "model.micro_batch_size=2"], GLOBAL_BATCH,
         "use model.global_batch_size=8"),
        ("sft", ["model.encoder_seq_length=4096"], "model.encoder_seq_length", "encoder_seq_length=2048 or less"),
        ("sft", ["model=qwen3_8b"], "model.hidden_size", "but the checkpoint has 128"),
        ("sft", ["pretrained_checkpoint.restore_from_path=/nope"], START, "no such dir"),
        ("sft", ["model.data.train_ds.file_path=/nope.jsonl"], "model.data.train_ds.file_path", "no such file"),
        ("sft", ["model.data.validation_ds.file_path=/nope.jsonl"], VALIDATION, "no such file"),
        ("sft", ["model.tokenizer.path=/nope"], "model.tokenizer.path", "no tokenizer here"),
        ("sft", ["model.activations_checkpoint_granularity=full"], RECOMPUTE, "needs"),
        ("sft", ["model.activations_checkpoint_num_layers=1"], RECOMPUTE, "leave both out"),
        ("sft", [f"{MONITOR}=val/los", f"{VALIDATION}=/nope.jsonl"], MONITOR, "did you mean val/loss?"),
        ("sft", [f"{MONITOR}=val/loss", f"{VALIDATION}=null"], MONITOR, "there is no validation file"),
        ("reward", [f"{MONITOR}=val/accuracy", f"{VALIDATION}=/nope.jsonl", "trainer.rm.val_check_interval=30"],
         "trainer.rm.save_interval", "use 120"),
        ("ppo", [f"{MONITOR}=val/loss", f"{VALIDATION}=/nope.jsonl"], MONITOR, "no validation metric 'val/loss'"),
        ("ppo", ["reward.restore_from_path=/nope"], "reward.restore_from_path", "no such dir"),
        ("ppo", ["critic.restore_from_path=/nope"], "critic.restore_from_path", "no such dir"),
        ("ppo", ["model.ppo.num_rollout_samples=12"], ROLLOUTS, "num_rollout_samples=16"),
        ("ppo", ["model.ppo.length_params.max_length=512"], "model.ppo.length_params.max_length", "no room for a"),
        ("ppo", ["model.ppo.length_params.min_length=200"], "model.ppo.length_params.min_length", "use 128 or less"),
        ("ppo", ["trainer.ppo.rollout_batch_seq_length=100"], "trainer.ppo.rollout_batch_seq_length", "use 512"),
        ("ppo", ["model.ppo.one_step_off=true"], "model.ppo.one_step_off", "set model.ppo.rollout_engine=vllm"),
        ("ppo", ["model.ppo.vllm.num_servers=2"], VLLM + "num_servers", "no effect with"),
        ("ppo", [*SERVERS, VLLM + "prefix_caching=true"], VLLM + "prefix_caching", "but model.ppo.vllm.servers are"),
        ("ppo", [USE_VLLM, "trainer.num_nodes=2"], VLLM + "servers", "give their addresses"),
        ("ppo", [USE_VLLM, VLLM + "servers=['a:80']"], VLLM + "servers", "entry 0, 'a:80', is no address"),
        ("ppo", [USE_VLLM, VLLM + "servers=['http://a','http://a/']"], VLLM + "servers", "names a server twice"),
        ("ppo", [*SERVERS, VLLM + "sync=nccl", VLLM + "sync_dir=x"], VLLM + "sync_dir", "no effect with sync=nccl"),
        ("ppo", [USE_VLLM, "model.ppo.sampling_params.top_p=0.9"], "model.ppo.sampling_params", "top_k=0 and top_p=1"),
        ("evaluate", ["tensor_parallel_size=3"], "tensor_parallel_size", "=1 or 2 or 4"),
        ("evaluate", ["sampling.max_tokens=4096"], "sampling.max_tokens", "leaves no room"),
        ("evaluate", ["scenes=/nope"], "scenes", "no such file"),
        ("demo", ["model=null"], "model", "use model=qwen3_tiny"),
        ("demo", ["ppo=['trainer.ppo.max_stps=3']"], "ppo: trainer.ppo.max_stps", "mean trainer.ppo.max_steps?"),
        ("demo", ["sft=['trainer.devices=two']"], "sft: trainer.devices", "wanted a whole number"),
    ],
)  # fmt: skip
def test_each_problem(stage: str, overrides: list[str], key: str, words: str, place: Path) -> None:
    problems = found(place, stage, *overrides)
    assert key in problems, problems
    assert words in problems[key]


def test_vllm_has_not_every_size_of_head_on_cpu(place: Path) -> None:
    on_cpu = [USE_VLLM, "trainer.accelerator=cpu"]
    assert found(place, "ppo", *on_cpu) == {}
    (place / "hf" / "config.json").write_text(json.dumps(TINY | {"head_dim": 16}))
    assert "heads of 16 on CPU" in found(place, "ppo", *on_cpu)["model.ppo.rollout_engine"]
    assert found(place, "ppo", *SERVERS, "trainer.accelerator=cpu") == {}


def test_a_directory_without_a_checkpoint_and_one_of_another_model(place: Path) -> None:
    (place / "empty").mkdir()
    problems = found(place, "sft", f"pretrained_checkpoint.restore_from_path={place}/empty")
    assert "neither a Hugging Face nor a Megatron" in problems["pretrained_checkpoint.restore_from_path"]
    (place / "hf" / "config.json").write_text(json.dumps(TINY | {"model_type": "llama"}))
    assert "dense Qwen3" in found(place, "sft")["pretrained_checkpoint.restore_from_path"]


def lora_run(place: Path, base: Path) -> None:
    """Make the checkpoint of run/ one of adapters on all attention, rank 4."""
    manifest = next((place / "run").glob("checkpoints/*/manifest.json"))
    body = json.loads(manifest.read_text())
    lora = {"targets": ["linear_qkv", "linear_proj"], "rank": 4, "alpha": 4.0, "dropout": 0.0}
    body["models"]["model"] |= {"lora": lora, "base": {"path": str(base), "digest": "0"}}
    manifest.write_text(json.dumps(body))


def test_adapters_must_be_those_configured(place: Path) -> None:
    lora, tuning = f"{PEFT}peft_scheme=lora", f"{PEFT}lora_tuning."
    restore = f"{PEFT}restore_from_path={place}/run"
    assert found(place, "sft", lora) == {}
    assert "has an effect with" in found(place, "sft", restore)[f"{PEFT}restore_from_path"]
    assert "it has no LoRA adapters" in found(place, "sft", lora, restore)[f"{PEFT}restore_from_path"]
    lora_run(place, place / "hf")
    fitting = [f"{tuning}target_modules=[attention]", f"{tuning}adapter_dim=4"]
    assert found(place, "sft", lora, restore, *fitting) == {}
    problem = found(place, "sft", lora, restore, f"{tuning}adapter_dim=8")[f"{PEFT}restore_from_path"]
    assert "adapters' rank is 4, the model configured has 8" in problem
    assert "targets is ['linear_qkv', 'linear_proj'], the model configured has ['linear_qkv']" in problem
    nowhere = found(place, "ppo", lora, f"{PEFT}restore_from_path={place}/hf", f"{tuning}adapter_dropout=0.1")
    assert "no finished checkpoint" in nowhere[f"{PEFT}restore_from_path"]
    assert "adapter_dropout=0.0 for PPO" in nowhere[f"{tuning}adapter_dropout"]


def test_a_lora_checkpoint_without_its_base(place: Path) -> None:
    lora_run(place, place / "gone")
    source = f"pretrained_checkpoint.restore_from_path={place}/run"
    assert "belong to the model at" in found(place, "sft", source)[START]
    assert "base=DIR" in found(place, "export")["checkpoint"]
    assert found(place, "export", f"base={place}/hf") == {}
    assert "no such dir" in found(place, "export", f"base={place}/nope")["base"]


def test_a_megatron_checkpoint_gives_its_shape_too(place: Path) -> None:
    source = f"pretrained_checkpoint.restore_from_path={place}/run"
    assert found(place, "sft", source) == {}
    problems = found(place, "sft", source, "model.tensor_model_parallel_size=3", "trainer.devices=3")
    assert "num_query_groups = 2" in problems["model.tensor_model_parallel_size"]


def test_a_reward_model_of_another_vocabulary_or_shape(place: Path) -> None:
    (place / "reward").mkdir()
    other = TINY | {"vocab_size": 2048, "num_key_value_heads": 1}
    (place / "reward" / "config.json").write_text(json.dumps(other))
    key = "reward.restore_from_path"
    assert "vocabulary of 2048, but the actor's is 1024" in found(place, "ppo", f"{key}={place}/reward")[key]
    other["vocab_size"] = 1024
    (place / "reward" / "config.json").write_text(json.dumps(other))
    assert found(place, "ppo", f"{key}={place}/reward") == {}
    split = [f"{TP}=2", "trainer.devices=2"]
    (place / "reward" / "config.json").write_text(json.dumps(other | {"intermediate_size": 255}))
    assert "2 does not divide model.ffn_hidden_size = 255" in found(place, "ppo", f"{key}={place}/reward", *split)[key]


def test_ranks_may_share_a_group(place: Path) -> None:
    """Two groups over four ranks: megatron-core gives a group's key and value to both of its ranks."""
    words = ("model.tensor_model_parallel_size=4", "trainer.devices=4", "model.make_vocab_size_divisible_by=1")
    assert TP not in found(place, "sft", *words)


def test_convert_and_export_want_each_the_other_s_kind(place: Path) -> None:
    assert "not a Hugging Face directory" in found(place, "convert", f"source={place}/run")["source"]
    assert "not a Megatron checkpoint" in found(place, "export", f"checkpoint={place}/hf")["checkpoint"]
    assert "vLLM reads Hugging Face" in found(place, "evaluate", f"model={place}/run")["model"]


def test_what_was_started_must_be_what_was_asked_for(place: Path) -> None:
    assert "2 processes were started" in found(place, "sft", WORLD_SIZE="2")["trainer.devices"]
    assert found(place, "sft", "trainer.devices=2", WORLD_SIZE="2") == {}


def test_an_empty_file_and_a_file_in_the_way(place: Path) -> None:
    (place / "data.jsonl").write_text("")
    (place / "out").write_text("")
    problems = found(place, "sft")
    assert "the file is empty" in problems["model.data.train_ds.file_path"]
    assert "is a file, not a directory" in problems["exp_manager.explicit_log_dir"]
