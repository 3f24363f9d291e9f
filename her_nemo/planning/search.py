"""Other configurations: single changes that make a plan fit, and the fastest layouts of a cluster."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.config.schema import PpoConfig
from her_nemo.planning import precision_checks
from her_nemo.planning.calibration import GPUS
from her_nemo.planning.preflight import data_parallel_size
from her_nemo.planning.shapes import Shape
from her_nemo.planning.stages import StagePlan, TrainingConfig, plan

TP, PP = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"
RECOMPUTE = "model.activations_checkpoint_"
FULL = {f"{RECOMPUTE}granularity": "full", f"{RECOMPUTE}method": "uniform", f"{RECOMPUTE}num_layers": 1}
NONE = dict.fromkeys(FULL, None)
NODES, ENGINE, SERVERS = "trainer.num_nodes", "model.ppo.rollout_engine", "model.ppo.vllm.servers"


@dataclass(frozen=True)
class Option:
    """One configuration that was planned: what it changes, and the plan."""

    changes: dict[str, Any]
    plan: StagePlan

    @property
    def overrides(self) -> str:
        """The changes as command-line overrides."""
        words = {True: "true", False: "false", None: "null"}
        return " ".join(
            f'"{key}={value}"'
            if isinstance(value, list)
            else f"{key}={words[value] if value is None or isinstance(value, bool) else value}"
            for key, value in self.changes.items()
        )

    def why(self) -> str:
        """One line: what binds it."""
        slowest = max(self.plan.phases, key=lambda phase: phase.seconds)
        share = slowest.seconds / self.plan.step_seconds
        return (
            f"{share:.0%} of the step is {slowest.name} ({slowest.bottleneck}); fullest in {self.plan.peak.name}, "
            f"{self.plan.headroom / 1e9:.0f} GB free"
            + (f"; slurm/rl.sh does it with VLLM_NODES={len(self.changes[SERVERS])}" if SERVERS in self.changes else "")
        )


def with_keys(config: Any, changes: dict[str, Any]) -> Any:
    """A copy of a configuration with some keys changed; not checked again."""
    for key, value in changes.items():
        config = _with_key(config, key.split("."), value)
    return config


def _with_key(section: Any, path: list[str], value: Any) -> Any:
    if len(path) == 1:
        return section.model_copy(update={path[0]: value})
    inner = _with_key(getattr(section, path[0]), path[1:], value)
    return section.model_copy(update={path[0]: inner})


def _divides(config: TrainingConfig, shape: Shape) -> bool:
    """What preflight would refuse: heads, layers, processes, batches."""
    model, trainer = config.model, config.trainer
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    groups = shape.num_query_groups
    if shape.num_attention_heads % tensor or shape.ffn_hidden_size % tensor or (groups % tensor and tensor % groups):
        return False
    if shape.num_layers % pipeline or trainer.world_size % (tensor * pipeline):
        return False
    if model.fp8 and precision_checks.misfits(model, vars(shape)):
        return False
    data = data_parallel_size(config)
    if model.global_batch_size % (data * model.micro_batch_size):
        return False
    ppo = getattr(model, "ppo", None)
    return ppo is None or ppo.num_rollout_samples % data == 0


def layouts(
    config: TrainingConfig, shape: Shape, *, length: float | None = None, best: int = 5, fp8: bool = False
) -> list[Option]:
    """The `best` fastest configurations that fit, over TP, PP, DP, micro-batch, recomputation, precision and, of PPO,
    who generates: the actor, or vLLM on some of the machines.

    TP stays within a machine; sequence parallelism goes with TP. DP follows from the rest. FP8 changes what is learned
    more than bf16 does, so it is looked at only if asked for (`fp8`). Context parallelism and interleaved stages are
    not: the trainer has neither.

    Raises:
        UserError: `fp8`, where the stage or the GPU has no FP8.
    """
    if fp8 and "fp8" not in type(config.model).model_fields:
        raise UserError("--fp8: this stage has no model.fp8")
    gpu = GPUS[config.trainer.gpu or "h100_80gb"]
    if fp8 and gpu.fp8 <= gpu.bf16:
        raise UserError(f"--fp8: {gpu.name} has no FP8; choose a cluster of H100 or H200")
    found: list[Option] = []
    trainer = config.trainer
    tensors = [size for size in (1, 2, 4, 8) if size <= trainer.devices]
    pipelines = [size for size in range(1, 17) if shape.num_layers % size == 0]
    precisions = [
        {"trainer.precision": name} for name in dict.fromkeys([trainer.precision, "bf16-mixed", "bf16"])
    ]
    if fp8:
        precisions = [{**choice, "model.fp8": False} for choice in precisions]
        precisions.append({"trainer.precision": "bf16-mixed", "model.fp8": True})
    too_large: set[tuple[Any, ...]] = set()  # a larger micro-batch needs no less
    for rows, engine, tensor, pipeline, redo, precision in itertools.product(
        (1, 2, 4, 8), _engines(config), tensors, pipelines, (False, True), precisions
    ):
        kind = (tensor, pipeline, redo, engine.get(NODES), *precision.values())
        if kind in too_large:
            continue
        changes = {
            TP: tensor,
            PP: pipeline,
            "model.sequence_parallel": tensor > 1,
            "model.micro_batch_size": rows,
        }
        changes |= (FULL if redo else NONE) | precision | engine
        changed = with_keys(config, changes)
        if _divides(changed, shape):
            option = Option(changes, plan(changed, shape, length))
            if option.plan.headroom >= 0:
                found.append(option)
            else:
                too_large.add(kind)
    found.sort(key=lambda option: option.plan.step_seconds)
    return [Option(_news(config, option.changes), option.plan) for option in _distinct(found)[:best]]


def _news(config: TrainingConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes that change something, with the layout always named."""
    return {key: value for key, value in changes.items() if key in (TP, PP) or _get(config, key) != value}


def _distinct(options: list[Option]) -> list[Option]:
    """One option per TP, PP and machines: its fastest. Else the list would be one layout in five shades."""
    seen: dict[tuple[int, int, int | None], Option] = {}
    for option in options:
        seen.setdefault((option.changes[TP], option.changes[PP], option.changes.get(NODES)), option)
    return list(seen.values())


def _engines(config: TrainingConfig) -> list[dict[str, Any]]:
    """Who may generate in PPO: as configured, or vLLM on one, a quarter or half of the machines."""
    found: list[dict[str, Any]] = [{}]
    nodes = config.trainer.num_nodes
    if not isinstance(config, PpoConfig) or config.model.ppo.rollout_engine == "vllm":
        return found
    for serving in sorted({1, nodes // 4, nodes // 2} - {0, nodes}):
        urls = [f"http://node{nodes - serving + index + 1}:8000" for index in range(serving)]
        found.append({NODES: nodes - serving, ENGINE: "vllm", SERVERS: urls})
    return found


def _single_changes(config: TrainingConfig) -> Iterator[dict[str, Any]]:
    model = config.model
    for key in (
        "model.micro_batch_size",
        "model.ppo.forward_micro_batch_size",
        "model.ppo.rollout_micro_batch_size",
    ):
        if key.startswith("model.ppo") and getattr(model, "ppo", None) is None:
            continue
        size = _get(config, key)
        if size > 1:
            yield {key: max(1, size // 2)}
            yield {key: 1}
    if model.tensor_model_parallel_size > 1 and not model.sequence_parallel:
        yield {"model.sequence_parallel": True}
    if model.activations_checkpoint_granularity != "full":
        yield dict(FULL)
    if config.trainer.precision == "32":
        yield {"trainer.precision": "bf16-mixed"}
    if config.trainer.precision != "bf16":
        yield {"trainer.precision": "bf16"}
    if model.optim.name == "fused_adam":
        yield {"model.optim.name": "distributed_fused_adam"}
    for factor in (2, 4, 8):
        yield {TP: model.tensor_model_parallel_size * factor, "model.sequence_parallel": True}
        yield {PP: model.pipeline_model_parallel_size * factor}
    for factor in (2, 4):
        yield {NODES: config.trainer.num_nodes * factor}


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def fixes(
    config: TrainingConfig, shape: Shape, *, length: float | None = None, best: int = 3
) -> list[Option]:
    """The `best` cheapest changes that make the plan fit: single ones if they do, else two or three together.

    Cheapest is least GPU time per step, changes that need no more machines first.
    """
    singles = list(_single_changes(config))
    found: list[Option] = []
    for size in (1, 2, 3):
        for chosen in itertools.combinations(singles, size):
            changes = {key: value for change in chosen for key, value in change.items()}
            if len(changes) < sum(len(change) for change in chosen):
                continue  # two values for one key
            changed = with_keys(config, changes)
            if changed.model.tensor_model_parallel_size > changed.trainer.devices or not _divides(
                changed, shape
            ):
                continue
            option = Option(changes, plan(changed, shape, length))
            # A change more than is needed is no answer.
            if option.plan.headroom >= 0 and not any(old.changes.items() <= changes.items() for old in found):
                found.append(option)
        if len(found) >= best:
            break
    # A change of the file costs nothing, machines do.
    found.sort(key=lambda o: (NODES in o.changes, o.plan.step_seconds * o.plan.gpus))
    return found[:best]
