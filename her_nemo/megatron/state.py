"""Sharded checkpoints of model, optimizer, schedule and random state, through megatron-core's dist_checkpointing.

A checkpoint can be loaded at any tensor, pipeline and data-parallel layout; at the layout it was written with,
a run continues bit for bit. Nothing in a checkpoint is unpickled freely: tensors are read as tensors, our own
extras are JSON and safetensors, and torch's `.metadata` index passes an allow-list first.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pickle
import queue
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors.torch import load_file, save_file

from her_nemo.config import lora as adapter_config
from her_nemo.config.errors import UserError
from her_nemo.config.lora import Lora
from her_nemo.megatron import adapters, fp8_state, parallel
from her_nemo.megatron.optimizer import Scheduler
from her_nemo.megatron.precision import remember
from her_nemo.megatron.qwen3 import Head, Model, Qwen3Shape
from her_nemo.megatron.torch_dist import INDEX, read_index
from her_nemo.megatron.weights import zero_vocabulary_padding

ABOUT = "her_nemo.json"
_FORMAT = 1


class _InProcessSave(TorchDistSaveShardedStrategy):
    """megatron-core's torch_dist writer, writing from this process.

    The original forks writers and spawns a manager process for their results; a spawned process imports the
    entry script again and hangs a script without a `__main__` guard. A synchronous save gains nothing from them.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> AsyncRequest:
        before = filesystem_async._results_queue
        filesystem_async._results_queue = queue.Queue()
        try:
            return super().async_save(sharded_state_dict, checkpoint_dir)
        finally:
            filesystem_async._results_queue = before

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)
        if request.async_fn is None:
            return request
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        return request._replace(async_fn=functools.partial(_write_buckets, transforms))


def _write_buckets(transforms: list[Any], _rank: int, buckets: list[Any], results: queue.Queue) -> None:
    """Write each bucket to its file and report as megatron-core's writer processes do."""
    report: dict[int, Any] = {}
    for index, bucket in enumerate(buckets):
        done: queue.Queue = queue.Queue()
        pending: queue.Queue = queue.Queue()
        pending.put(index)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, done, pending, True)
        _, written = done.get_nowait()
        if isinstance(written, Exception):
            results.put(written)
            return
        report[index] = written
    results.put(report)


def save(
    directory: str | Path,
    model: Model,
    optimizer: MegatronOptimizer | None = None,
    scheduler: Scheduler | None = None,
    *,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write everything needed to continue into `directory` (made if absent, must be empty). Collective.

    Of a model with adapters, these alone: the base is where it came from.
    `extra` is JSON: counters, data-loader state; global rank 0's is kept.
    """
    directory = Path(directory)
    if parallel.any_rank(parallel.is_main() and directory.is_dir() and any(directory.iterdir())):
        raise UserError(f"{directory} is not empty: a checkpoint is never written over another")
    directory.mkdir(parents=True, exist_ok=True)
    parallel.barrier()
    content = _sharded(model, optimizer, only_adapters=model.lora is not None, is_loading=False)
    dist_checkpointing.save(content, str(directory), sharded_strategy=_InProcessSave())
    save_file(_random_state(), directory / _own_file("rng"))
    scales = fp8_state.collect(model.bare())
    if scales:
        save_file(scales, directory / _own_file("fp8"))
    if parallel.is_main():
        described = describe(
            model.shape,
            model.head,
            model.precision.name,
            layout=_layout(),
            has_optimizer=optimizer is not None,
            distributed_optimizer=model.distributed_optimizer,
            scheduler=None if scheduler is None else scheduler.state_dict(),
            extra=extra or {},
            lora=model.lora,
        )
        (directory / ABOUT).write_text(json.dumps(described, indent=2) + "\n")
    parallel.barrier()


def describe(
    shape: Qwen3Shape,
    head: Head,
    precision: str,
    *,
    layout: dict[str, int],
    has_optimizer: bool = False,
    distributed_optimizer: bool = False,
    scheduler: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    lora: Lora | None = None,
) -> dict[str, Any]:
    """What a checkpoint says of itself, the content of `her_nemo.json`."""
    adapted = {} if lora is None else {"lora": lora.to_json()}
    return adapted | {
        "format": _FORMAT,
        "head": head,
        "fingerprint": shape.fingerprint(head),
        "shape": vars(shape),
        "precision": precision,
        "layout": layout,
        "has_optimizer": has_optimizer,
        "distributed_optimizer": distributed_optimizer,
        "scheduler": scheduler,
        "extra": extra or {},
    }


def about(directory: str | Path) -> dict[str, Any]:
    """What `save` wrote about the checkpoint: head, fingerprint, shape, layout, scheduler, extra."""
    file = Path(directory) / ABOUT
    if not file.is_file():
        raise UserError(f"{file} does not exist: {directory} is not a her_nemo checkpoint")
    found = json.loads(file.read_text())
    if found.get("format") != _FORMAT:
        raise UserError(f"{file}: format {found.get('format')!r} is not {_FORMAT}")
    return found


def is_checkpoint(directory: str | Path) -> bool:
    """True if `directory` was written by `save`."""
    return (Path(directory) / ABOUT).is_file()


def shape_of(directory: str | Path) -> Qwen3Shape:
    """The model shape that the checkpoint was written with."""
    return Qwen3Shape(**about(directory)["shape"])


def load(
    directory: str | Path,
    model: Model,
    optimizer: MegatronOptimizer | None = None,
    scheduler: Scheduler | None = None,
    *,
    restore_rng: bool | None = None,
) -> dict[str, Any]:
    """Fill model, and optimizer and scheduler if given, from a checkpoint of any layout. Returns `extra`.

    Random state is restored when an optimizer is given and the layout is the one of the save (`restore_rng`
    overrides the first condition); at another layout it cannot be. A scalar-headed model may be filled from a
    language model's checkpoint, without optimizer: its head is then drawn anew. A checkpoint of adapters fills the
    adapters of a model that has the same, and leaves its base alone; one without fills the base.
    Raises UserError if the checkpoint holds another model or lacks what is asked for.
    """
    directory = Path(directory)
    found = about(directory)
    _check_match(directory, found, model, optimizer)
    new_head = model.head == "scalar" and found["head"] == "lm"
    content = _sharded(model, optimizer, only_adapters=found.get("lora") is not None, is_loading=True)
    if new_head:
        content["model"].pop("output_layer.weight", None)
    read_index(directory / INDEX)
    with _refused_pickles(directory):
        loaded = dist_checkpointing.load(content, str(directory), strict=StrictHandling.RAISE_UNEXPECTED)
    model.bare().load_state_dict(loaded["model"], strict=False)
    for name, parameter in model.bare().named_parameters():
        if torch.is_tensor(loaded["model"].get(name)):
            remember(parameter, loaded["model"][name])
    if new_head and parallel.is_last_stage():
        model.bare().output_layer.reset()
    zero_vocabulary_padding(model)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    if scheduler is not None:
        if found["scheduler"] is None:
            raise UserError(f"{directory} was saved without a scheduler: it holds weights, not a run to continue")
        scheduler.load_state_dict(found["scheduler"])
    same_layout = found["layout"] == _layout()
    if (restore_rng if restore_rng is not None else optimizer is not None) and same_layout:
        _set_random_state(load_file(directory / _own_file("rng")))
    scales = directory / _own_file("fp8")
    fp8 = model.precision.fp8
    if optimizer is not None and same_layout and scales.is_file() and fp8 is not None and fp8.recipe == "delayed":
        fp8_state.restore(model.bare(), load_file(scales), get_fp8_recipe(model.config))
    parallel.barrier()
    return found["extra"]


def _check_match(
    directory: Path, found: dict[str, Any], model: Model, optimizer: MegatronOptimizer | None
) -> None:
    shape = Qwen3Shape(**found["shape"])
    same = found["fingerprint"] == model.fingerprint()
    # Tying only concerns the vocabulary head, which a new scalar head replaces.
    from_lm = (
        optimizer is None
        and (found["head"], model.head) == ("lm", "scalar")
        and shape.fingerprint("scalar") == model.fingerprint()
    )
    if not same and not from_lm:
        mine = vars(model.shape) | {"head": model.head}
        theirs = found["shape"] | {"head": found["head"]}
        free = {"max_position_embeddings", "init_method_std"}
        differences = [
            f"{key}: checkpoint {theirs[key]!r}, model {mine[key]!r}"
            for key in mine
            if key not in free and mine[key] != theirs[key]
        ]
        raise UserError(f"{directory} holds another model:\n  " + "\n  ".join(differences))
    held = Lora.from_json(found.get("lora"))
    if held is not None or optimizer is not None:
        differing = adapter_config.problem_of(held, model.lora)
        if differing:
            raise UserError(f"{directory} holds another model: {differing}")
    if optimizer is not None and not found["has_optimizer"]:
        raise UserError(f"{directory} was saved without an optimizer: it holds weights, not a run to continue")
    if optimizer is not None and found["distributed_optimizer"] != model.distributed_optimizer:
        kinds = ("fused_adam", "distributed_fused_adam")
        raise UserError(
            f"{directory} was saved with model.optim.name={kinds[found['distributed_optimizer']]}; this run has "
            f"{kinds[model.distributed_optimizer]}: continue with the same one"
        )
    if optimizer is not None and found["precision"] != model.precision.name:
        raise UserError(
            f"{directory} was saved with trainer.precision={found['precision']}; this run has "
            f"{model.precision.name}: continue with the same one, or start from its weights"
        )


def _sharded(
    model: Model, optimizer: MegatronOptimizer | None, *, only_adapters: bool, is_loading: bool
) -> dict[str, Any]:
    """What this rank holds of the adapters or else of the base, as megatron-core's sharded state dict, tensors only."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    # Non-tensor entries are Transformer Engine's pickled extra states; fp8_state saves what they would hold.
    weights, _ = extract_matching_values(
        model.bare().sharded_state_dict(metadata=metadata), lambda value: not isinstance(value, ShardedObject)
    )
    weights = {key: value for key, value in weights.items() if adapters.is_adapter(key) == only_adapters}
    content: dict[str, Any] = {"model": weights}
    if optimizer is not None:
        content["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return content


def _layout() -> dict[str, int]:
    return {
        "tensor": parallel.tensor_size(),
        "pipeline": parallel.pipeline_size(),
        "data": parallel.data_size(),
    }


# ---------------------------------------------------------------- random state


def _own_file(what: str) -> str:
    """The file of this rank's own state."""
    return f"{what}_{torch.distributed.get_rank():05d}.safetensors"


def _random_state() -> dict[str, torch.Tensor]:
    """Every generator of this process as tensors."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    for tracked, value in get_cuda_rng_tracker().get_states().items():
        state[f"tracker.{tracked}"] = value.clone()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    version, *internal = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(internal), gauss[0] if gauss else None))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    # Generators of a CPU and of a GPU have states of different sizes: from the other kind of device, the tracked
    # ones stay as they were seeded.
    mine = get_cuda_rng_tracker().get_states()
    saved = {name: state.get(f"tracker.{name}", value) for name, value in mine.items()}
    if all(saved[name].numel() == value.numel() for name, value in mine.items()):
        get_cuda_rng_tracker().set_states(saved)


# ---------------------------------------------------------------- no free unpickling

@contextlib.contextmanager
def _refused_pickles(directory: Path) -> Iterator[None]:
    """Turns torch's refusal of an unsafe `common.pt` into an error that says what is wrong."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(f"{directory} holds a file that is not plain tensors and numbers: {error}") from None
