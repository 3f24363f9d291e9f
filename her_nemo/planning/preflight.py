"""What can be known to fail before any process starts: divisibility, paths, shapes that do not agree.

`check` returns every problem at once, each with the key to change. No torch, no process group, no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from her_nemo.config.architecture import (
    Shape,
    architecture_from_hf,
    architecture_from_megatron,
    megatron_manifest,
)
from her_nemo.config.chat import ChatConfig
from her_nemo.config.compose import load
from her_nemo.config.data import IngestConfig, InspectConfig
from her_nemo.config.errors import ConfigErrors, Problem, UserError, nearest
from her_nemo.config.evaluation import CoserConfig
from her_nemo.config.judge import JudgeConfig, JudgePromptsConfig
from her_nemo.config.reward_bench import RewardBenchConfig
from her_nemo.config.roleplay_bench import CompareConfig, RoleplayBenchConfig
from her_nemo.config.schema import (
    ConvertConfig,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    ParallelModel,
    PpoConfig,
    RewardConfig,
    SftConfig,
    StageConfig,
    VerifyConfig,
)
from her_nemo.config.synthesis import SynthesiseConfig
from her_nemo.planning import (
    adapter_checks,
    backend_checks,
    benchmark_checks,
    chat_checks,
    data_checks,
    judge_checks,
    ppo_checks,
    precision_checks,
    roleplay_bench_checks,
    rollout_checks,
    server_checks,
)
from her_nemo.roleplay.kinds import Kind

TP, PP = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"


def check(config: StageConfig, environment: Mapping[str, str] | None = None) -> list[Problem]:
    """Everything that is wrong with `config`. `environment` is os.environ under torchrun, for WORLD_SIZE."""
    problems: list[Problem] = []
    if isinstance(config, SftConfig | RewardConfig | PpoConfig):
        shape, found = _source(
            "pretrained_checkpoint.restore_from_path", config.pretrained_checkpoint.restore_from_path
        )
        problems += [*found, *_agreement(config.model, shape), *_layout(config.model, shape)]
        problems += [*_processes(config, environment or {}), *_batches(config), *_training_paths(config)]
        problems += [*_lengths(config.model, shape), *_recompute(config.model), *_monitor(config)]
        problems += precision_checks.check(config, shape | config.model.architecture())
        problems += backend_checks.check(config)
    if isinstance(config, SftConfig | PpoConfig):
        problems += adapter_checks.check(config)
    if isinstance(config, PpoConfig):
        problems += [*_ppo(config), *_scorers(config, shape | config.model.architecture())]
        problems += rollout_checks.check(config, shape | config.model.architecture())
        problems += judge_checks.check(config, environment or {})
    if isinstance(config, ConvertConfig | ExportConfig):
        problems += _conversion(config, environment or {})
    if isinstance(config, VerifyConfig):
        problems += [*_source("a", config.a)[1], *_source("b", config.b)[1]]
    if isinstance(config, EvaluateConfig | JudgeConfig):
        problems += _evaluation(config)
    if isinstance(config, CoserConfig):
        problems += benchmark_checks.coser(config, environment or {})
    if isinstance(config, ChatConfig):
        shape, found = ({}, []) if config.checkpoint is None else _source("checkpoint", config.checkpoint)
        problems += [*found, *chat_checks.check(config, shape, environment or {})]
    if isinstance(config, RoleplayBenchConfig):
        problems += roleplay_bench_checks.bench(config, environment or {})
    if isinstance(config, RewardBenchConfig):
        found = [] if config.model is None else _source("model", config.model)[1]
        problems += [*found, *roleplay_bench_checks.reward_model(config)]
    if isinstance(config, CompareConfig):
        problems += roleplay_bench_checks.comparison(config)
    if isinstance(config, DemoConfig):
        problems += _demo(config)
    if isinstance(config, IngestConfig):
        problems += data_checks.ingest(config)
    if isinstance(config, JudgePromptsConfig):
        problems += [*_file("source", config.source), *_target("out", config.out)]
    if isinstance(config, SynthesiseConfig):
        problems += data_checks.synthesise(config, environment or {})
    if isinstance(config, InspectConfig):
        problems += data_checks.inspect(config)
        if config.tokenizer is not None:
            problems += _tokenizer("tokenizer", config.tokenizer)
    return problems


# ---------------------------------------------------------------- shapes and layout


def _source(key: str, path: str) -> tuple[Shape, list[Problem]]:
    """The architecture a path holds, with what is wrong with the path."""
    folder = Path(path)
    if not folder.exists():
        return {}, [Problem(key, f"{path}: no such directory", hint="give a directory that exists")]
    try:
        if (folder / "config.json").is_file():
            return architecture_from_hf(folder), []
        if megatron_manifest(folder) is not None:
            return architecture_from_megatron(folder), list(adapter_checks.base_is_there(key, folder))
    except UserError as error:
        return {}, [Problem(key, str(error))]
    hint = "a Hugging Face directory has config.json; a Megatron one manifest.json, or checkpoints/latest of a run"
    return {}, [
        Problem(key, f"{path}: neither a Hugging Face nor a Megatron checkpoint directory", hint=hint)
    ]


def _agreement(model: ParallelModel, shape: Shape) -> Iterator[Problem]:
    """Keys given explicitly must be those of the checkpoint."""
    for key, given in model.architecture().items():
        if key in shape and shape[key] != given:
            hint = f"leave model.{key} out (the checkpoint's shape is used), or start from another checkpoint"
            yield Problem(f"model.{key}", f"given {given}, but the checkpoint has {shape[key]}", hint=hint)


def _layout(model: ParallelModel, shape: Shape) -> Iterator[Problem]:
    """TP divides heads and the feed-forward; PP divides the layers; sequence parallelism has a TP."""
    yield from _cut(model, shape | model.architecture())
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        hint = f"set model.sequence_parallel=false, or {TP} to 2 or more"
        yield Problem("model.sequence_parallel", f"needs tensor parallelism, but {TP} is 1", hint=hint)


def _cut(model: ParallelModel, shape: Shape) -> Iterator[Problem]:
    """TP divides heads and the feed-forward, and the groups or they it; PP divides the layers."""
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        count = shape.get(name)
        # megatron-core lets several ranks share a group's key and value.
        shared = name == "num_query_groups" and count and tp % count == 0
        if count is not None and count % tp and not shared:
            yield Problem(
                TP, f"{tp} does not divide model.{name} = {count}", hint=_use_divisor(TP, int(count), tp)
            )
    layers = shape.get("num_layers")
    if layers is not None and layers % pp:
        yield Problem(
            PP, f"{pp} does not divide model.num_layers = {layers}", hint=_use_divisor(PP, int(layers), pp)
        )


def _use_divisor(key: str, count: int, given: int) -> str:
    divisors = [number for number in range(1, count + 1) if count % number == 0]
    near = sorted(sorted(divisors, key=lambda number: abs(number - given))[:3])
    return f"use {key}=" + " or ".join(str(number) for number in near)


def _processes(
    config: SftConfig | RewardConfig | PpoConfig | ConvertConfig | ExportConfig,
    environment: Mapping[str, str],
) -> Iterator[Problem]:
    """The number of processes is a multiple of TP x PP, and what was started is what the file says."""
    model, world = config.model, config.trainer.world_size
    replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    if world % replica:
        text = (
            f"{config.trainer.num_nodes} node(s) x {config.trainer.devices} = {world} processes, "
            f"not a multiple of TP {model.tensor_model_parallel_size} x "
            f"PP {model.pipeline_model_parallel_size} = {replica}"
        )
        yield Problem(
            "trainer.devices", text, hint=f"use trainer.devices={replica}, or a smaller {TP} or {PP}"
        )
    started = environment.get("WORLD_SIZE")
    if started is not None and int(started) != world:
        text = f"{started} processes were started (WORLD_SIZE), but num_nodes x devices = {world}"
        hint = f"start {world} processes, or set trainer.num_nodes and trainer.devices to what was started"
        yield Problem("trainer.devices", text, hint=hint)


def data_parallel_size(config: SftConfig | RewardConfig | PpoConfig) -> int:
    """Replicas of the model: world size / (TP x PP), at least 1."""
    model = config.model
    return max(
        1,
        config.trainer.world_size // (model.tensor_model_parallel_size * model.pipeline_model_parallel_size),
    )


def _batches(config: SftConfig | RewardConfig | PpoConfig) -> Iterator[Problem]:
    """The global batch is a whole number of micro-batches on every data-parallel rank."""
    data, micro, batch = (
        data_parallel_size(config),
        config.model.micro_batch_size,
        config.model.global_batch_size,
    )
    if batch % (data * micro):
        text = f"{batch} is not a multiple of data-parallel size {data} x micro_batch_size {micro} = {data * micro}"
        above = -(-batch // (data * micro)) * data * micro
        yield Problem("model.global_batch_size", text, hint=f"use model.global_batch_size={above}")


# ---------------------------------------------------------------- files


def _training_paths(config: SftConfig | RewardConfig | PpoConfig) -> Iterator[Problem]:
    data = config.model.data
    yield from _file("model.data.train_ds.file_path", data.train_ds.file_path)
    if data.validation_ds.file_path is not None:
        yield from _file("model.data.validation_ds.file_path", data.validation_ds.file_path)
    if config.model.tokenizer.path is not None:
        yield from _tokenizer("model.tokenizer.path", config.model.tokenizer.path)
    run_dir = Path(config.exp_manager.explicit_log_dir)
    if run_dir.exists() and not run_dir.is_dir():
        yield Problem("exp_manager.explicit_log_dir", f"{run_dir}: is a file, not a directory")


def _file(key: str, path: str) -> Iterator[Problem]:
    file = Path(path)
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "no such file"
        yield Problem(key, f"{path}: {what}", hint="give a JSON-lines file that exists")
    elif file.stat().st_size == 0:
        yield Problem(key, f"{path}: the file is empty")


def _tokenizer(key: str, path: str) -> Iterator[Problem]:
    if not (Path(path) / "tokenizer.json").is_file() and not (Path(path) / "tokenizer_config.json").is_file():
        yield Problem(
            key, f"{path}: no tokenizer here (tokenizer.json)", hint="give a Hugging Face tokenizer directory"
        )


def _target(key: str, path: str) -> Iterator[Problem]:
    if Path(path).exists() and not Path(path).is_dir():
        yield Problem(
            key, f"{path}: is a file, but a directory is to be written here", hint="give another path"
        )


# ---------------------------------------------------------------- lengths and recompute


def _lengths(model: ModelConfig, shape: Shape) -> Iterator[Problem]:
    limit = (shape | model.architecture()).get("max_position_embeddings")
    if limit is not None and model.encoder_seq_length > limit:
        text = f"{model.encoder_seq_length} is more than the model's max_position_embeddings = {limit}"
        yield Problem("model.encoder_seq_length", text, hint=f"use model.encoder_seq_length={limit} or less")


def _recompute(model: ModelConfig) -> Iterator[Problem]:
    method, layers = model.activations_checkpoint_method, model.activations_checkpoint_num_layers
    key = "model.activations_checkpoint_granularity"
    if model.activations_checkpoint_granularity == "full":
        if method is None or layers is None:
            hint = "add model.activations_checkpoint_method=uniform model.activations_checkpoint_num_layers=1"
            yield Problem(
                key,
                "full needs activations_checkpoint_method and activations_checkpoint_num_layers",
                hint=hint,
            )
    elif method is not None or layers is not None:
        text = "activations_checkpoint_method and _num_layers have an effect with granularity full only"
        yield Problem(key, text, hint=f"set {key}=full, or leave both out")


# ---------------------------------------------------------------- keeping the best checkpoints

_OF_ROLLOUTS = ("rewards", "response_lengths", "finished")


def _monitor(config: SftConfig | RewardConfig | PpoConfig) -> Iterator[Problem]:
    """The metric is one that validation measures, and it is measured whenever a checkpoint is written."""
    name = config.exp_manager.checkpoint_callback_params.monitor
    if name is None:
        return
    key = "exp_manager.checkpoint_callback_params.monitor"
    if isinstance(config, PpoConfig):
        loop, at, known = config.trainer.ppo, "trainer.ppo", [f"val_rollouts/{word}" for word in _OF_ROLLOUTS]
    elif isinstance(config, RewardConfig):
        loop, at, known = config.trainer.rm, "trainer.rm", ["val/loss", "val/accuracy", "val/margin", "val/score_mean"]
    else:
        loop, at = config.trainer.sft, "trainer.sft"
        known = ["val/loss", *(f"val_layers/{kind.value}/loss" for kind in Kind)]
    if name not in known:
        close = nearest(name, known)
        hint = f"did you mean {close}?" if close else f"use {' or '.join(known)}"
        yield Problem(key, f"no validation metric {name!r}", hint=hint)
    if config.model.data.validation_ds.file_path is None:
        hint = f"give model.data.validation_ds.file_path, or set {key}=null to keep the newest checkpoints"
        yield Problem(key, "nothing measures it: there is no validation file", hint=hint)
    elif loop.save_interval % loop.val_check_interval:
        text = f"{loop.save_interval} is not a multiple of {at}.val_check_interval = {loop.val_check_interval}: "
        hint = f"use {-(-loop.save_interval // loop.val_check_interval) * loop.val_check_interval}"
        yield Problem(f"{at}.save_interval", text + f"{name} would not be measured where it is saved", hint=hint)


# ---------------------------------------------------------------- stages of their own


def _ppo(config: PpoConfig) -> Iterator[Problem]:
    ppo, model, data = config.model.ppo, config.model, data_parallel_size(config)
    yield from ppo_checks.check(config, data)
    if ppo.num_rollout_samples % model.global_batch_size:
        above = -(-ppo.num_rollout_samples // model.global_batch_size) * model.global_batch_size
        text = f"{ppo.num_rollout_samples} is not a multiple of model.global_batch_size = {model.global_batch_size}"
        yield Problem(
            "model.ppo.num_rollout_samples", text, hint=f"use model.ppo.num_rollout_samples={above}"
        )
    if ppo.num_rollout_samples % data:
        text = f"{ppo.num_rollout_samples} is not a multiple of the data-parallel size {data}"
        above = -(-ppo.num_rollout_samples // data) * data
        yield Problem(
            "model.ppo.num_rollout_samples", text, hint=f"use model.ppo.num_rollout_samples={above}"
        )
    longest, total = ppo.length_params.max_length, model.encoder_seq_length
    if longest >= total:
        text = f"{longest} leaves no room for a prompt in model.encoder_seq_length = {total}"
        hint = "make it smaller, or model.encoder_seq_length larger"
        yield Problem("model.ppo.length_params.max_length", text, hint=hint)
    if ppo.length_params.min_length > longest:
        text = f"{ppo.length_params.min_length} is more than max_length = {longest}"
        yield Problem("model.ppo.length_params.min_length", text, hint=f"use {longest} or less")
    padded = config.trainer.ppo.rollout_batch_seq_length
    if padded is not None and padded < total:
        text = f"{padded} is less than the longest prompt + response, model.encoder_seq_length = {total}"
        yield Problem("trainer.ppo.rollout_batch_seq_length", text, hint=f"use {total}, or null")
    if ppo.vllm.sync_dir is not None:
        yield from _target("model.ppo.vllm.sync_dir", ppo.vllm.sync_dir)


def _scorers(config: PpoConfig, actor: Shape) -> Iterator[Problem]:
    """Reward model, critic and judge: they are there, and can be cut up as the actor is. But for the judge, who reads
    texts, they read the actor's tokens."""
    judge = "reward.generative.judge.restore_from_path"
    paths = {
        "reward.restore_from_path": config.reward.restore_from_path,
        "critic.restore_from_path": config.critic.restore_from_path,
        judge: config.reward.generative.judge.restore_from_path if config.reward.is_judged else None,
    }
    for key, path in paths.items():
        if path is None:
            continue
        shape, found = _source(key, path)
        yield from found
        rows = shape.get("vocab_size")
        if key != judge and rows is not None and rows != actor.get("vocab_size", rows):
            text = f"{path}: has a vocabulary of {rows}, but the actor's is {actor['vocab_size']}"
            yield Problem(key, text, hint="give one that was trained from the same tokenizer")
        for problem in _cut(config.model, shape):
            yield Problem(key, f"{path}: {problem.key}: {problem.message}", hint=problem.hint)


def _conversion(config: ConvertConfig | ExportConfig, environment: Mapping[str, str]) -> Iterator[Problem]:
    key, path = (
        ("source", config.source) if isinstance(config, ConvertConfig) else ("checkpoint", config.checkpoint)
    )
    shape, found = _source(key, path)
    if isinstance(config, ExportConfig) and config.base is not None:
        found = [] if shape else found  # the base is elsewhere now
        yield from _source("base", config.base)[1]
    yield from found
    is_hf = (Path(path) / "config.json").is_file()
    if not found and is_hf != isinstance(config, ConvertConfig):
        wanted = (
            "a Hugging Face directory (with config.json)"
            if key == "source"
            else "a Megatron checkpoint directory"
        )
        yield Problem(key, f"{path}: not {wanted}", hint="convert reads Hugging Face, export reads Megatron")
    yield from _agreement(config.model, shape)
    yield from _layout(config.model, shape)
    if isinstance(config, ExportConfig):
        yield from _processes(config, environment)
        yield from precision_checks.export(config, shape | config.model.architecture())
    yield from _target("out", config.out)
    tokenizer = config.tokenizer if isinstance(config, ExportConfig) else config.model.tokenizer.path
    if tokenizer is not None:
        yield from _tokenizer(
            "tokenizer" if isinstance(config, ExportConfig) else "model.tokenizer.path", tokenizer
        )


def _evaluation(config: EvaluateConfig | JudgeConfig) -> Iterator[Problem]:
    shape, found = _source("model", config.model)
    yield from found
    if not found and not (Path(config.model) / "config.json").is_file():
        hint = "run her-nemo export on it first, and give the directory that export wrote"
        yield Problem(
            "model", f"{config.model}: vLLM reads Hugging Face directories (with config.json)", hint=hint
        )
    yield from _file("prompts", config.prompts)
    if isinstance(config, EvaluateConfig) and config.scenes is not None:
        yield from _file("scenes", config.scenes)
    yield from _target("out", config.out)
    yield from server_checks.room_for_a_prompt(config, shape)
    heads = shape.get("num_attention_heads")
    if heads is not None and heads % config.tensor_parallel_size:
        text = f"{config.tensor_parallel_size} does not divide the model's {heads} attention heads"
        hint = _use_divisor("tensor_parallel_size", int(heads), config.tensor_parallel_size)
        yield Problem("tensor_parallel_size", text, hint=hint)


# What the demo itself passes to each stage; the rest of a stage's keys come from the demo's lists.
PASSED_BY_DEMO = {
    "convert": ["source=x", "out=x"],
    "sft": ["model.data.train_ds.file_path=x", "pretrained_checkpoint.restore_from_path=x"],
    "reward": ["model.data.train_ds.file_path=x", "pretrained_checkpoint.restore_from_path=x"],
    "ppo": [
        "model.data.train_ds.file_path=x",
        "pretrained_checkpoint.restore_from_path=x",
        "reward.restore_from_path=x",
    ],
    "export": ["checkpoint=x", "out=x"],
    "evaluate": ["model=x", "prompts=x", "out=x"],
}


def _demo(config: DemoConfig) -> Iterator[Problem]:
    """The demo's own keys, and its lists of overrides: a slip in ppo's would else show after minutes."""
    missing = [key for key, value in config.model.model_dump().items() if value is None]
    if missing:
        hint = "use model=qwen3_tiny, or give them all"
        yield Problem(
            "model", f"the demo makes its model from scratch and needs {', '.join(missing)}", hint=hint
        )
    yield from _target("out", config.out)
    for stage, passed in PASSED_BY_DEMO.items():
        try:
            load(stage, [*passed, *getattr(config, stage)])
        except ConfigErrors as error:
            for problem in error.problems:
                yield Problem(
                    f"{stage}: {problem.key}", problem.message, f"the demo's list {stage!r}", problem.hint
                )
