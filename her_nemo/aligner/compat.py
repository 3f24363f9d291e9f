"""What NeMo-Aligner 0.7.0's trainers need beside NeMo 3 and without CUDA. Nothing happens before `install()`.

NeMo-Aligner imports `nemo.collections.nlp`, which NeMo 3 no longer has, and TensorRT-LLM. Its trainers use little of
either: `STAND_INS` is all of it, and why. What only NeMo-Aligner's own models use is a name that refuses to be used.
Where CUDA is missing, `ON_CPU` lists the modules that are given a `torch` whose CUDA names lead to the CPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from her_nemo.config.errors import UserError
from her_nemo.megatron import parallel, platform

VERSION = "0.7.0"


@dataclass(frozen=True)
class StandIn:
    """One module that cannot be imported here, and what stands in for the names NeMo-Aligner takes from it."""

    module: str
    names: Mapping[str, Any]
    why: str


def _absent(name: str) -> type:
    """A class that can be named and inherited from, but not made or called: only NeMo-Aligner's own models use it."""

    def refuse(self: object, *_: object, **__: object) -> None:
        raise NotImplementedError(f"{name} is not in NeMo 3; her_nemo's own models take its place (docs/aligner.md)")

    return type(name, (), {"__init__": refuse, "__doc__": f"Stands where NeMo 1 had {name}."})


def _absents(*names: str) -> dict[str, type]:
    return {name: _absent(name) for name in names}


# ---------------------------------------------------------------- what does work


class EpochSampler:
    """What the trainers ask of NeMo's samplers: `isinstance`, and these four numbers.

    The order itself is ours (aligner/glue.py), so that both backends see the same batches.
    """

    drop_last = True

    def __init__(self, total_samples: int, global_batch_size: int, micro_batch_size: int) -> None:
        self.total_samples = total_samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size


def split_batch(batch: Mapping[str, torch.Tensor] | Sequence[torch.Tensor], parts: int) -> Iterator[Any]:
    """The rows of every tensor in `parts` equal pieces, as dicts or lists like `batch`.

    Raises:
        ValueError: the rows do not divide.
    """
    tensors = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    uneven = sorted({len(tensor) for tensor in tensors if len(tensor) % parts})
    if uneven:
        raise ValueError(f"{uneven} rows do not divide into {parts} parts")
    pieces = zip(*(tensor.tensor_split(parts) for tensor in tensors), strict=True)
    if isinstance(batch, Mapping):
        return iter([dict(zip(batch, piece, strict=True)) for piece in pieces])
    return iter([list(piece) for piece in pieces])


def clip_by_optimizer(optimizer: Any, max_norm: float) -> float:
    """Clip through the optimizer's own method; returns the norm before."""
    return optimizer.clip(max_norm)


def average_over_replicas(losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """[len(losses)] detached means over the data-parallel replicas (collective)."""
    stacked = torch.cat([loss.detach().clone().view(1) for loss in losses])
    return parallel.data_all_reduce(stacked) / parallel.data_size()


def causal_masks(data: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(attention [1, 1, S, S] True where not allowed, loss mask [B, S] of ones, positions [B, S])."""
    length = data.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool, device=data.device).triu(1)
    positions = torch.arange(length, device=data.device).expand_as(data)
    return hidden[None, None], torch.ones_like(data, dtype=torch.float32), positions


# ---------------------------------------------------------------- the table

_NLP = "nemo.collections.nlp."
_MEGATRON = _NLP + "modules.common.megatron."

STAND_INS: tuple[StandIn, ...] = (
    StandIn(
        _NLP + "data.language_modeling.megatron.megatron_batch_samplers",
        {"MegatronPretrainingRandomBatchSampler": EpochSampler},
        "SupervisedTrainer reads its sizes and, for several epochs, asks whether it is one",
    ),
    StandIn(
        _NLP + "data.language_modeling.megatron.data_samplers",
        {"MegatronPretrainingRandomSampler": EpochSampler},
        "the same for PPOTrainer",
    ),
    StandIn(
        _MEGATRON + "utils",
        {
            "get_iterator_k_split": split_batch,
            "average_losses_across_data_parallel_group": average_over_replicas,
            "get_ltor_masks_and_position_ids": causal_masks,
        },
        "PPOTrainer splits a rollout into minibatches with the first; the losses of NeMo-Aligner's models, which our "
        "tests compare with, need the others",
    ),
    StandIn(
        _MEGATRON + "clip_grads",
        {"clip_grad_norm_distributed_optimizer": clip_by_optimizer, **_absents("clip_grad_norm_fp32")},
        "the trainers clip through it; the gradients are megatron-core's optimizer's, which clips them",
    ),
    StandIn(_MEGATRON + "module", _absents("Float16Module"), "used by NeMo-Aligner's models only"),
    StandIn(
        _NLP + "models.language_modeling.megatron_gpt_model",
        _absents("MegatronGPTModel", "get_specs"),
        "base of NeMo-Aligner's models, which need apex and cannot express Qwen3's q/k norms",
    ),
    StandIn(_NLP + "modules.common.lm_utils", _absents("pad_batch"), "used by NeMo-Aligner's models only"),
    StandIn(
        _NLP + "modules.common.text_generation_strategy",
        _absents("GPTModelTextGenerationStrategy", "TextGenerationStrategy"),
        "generation of NeMo-Aligner's models; ours is the rollout engine",
    ),
    StandIn(
        _NLP + "modules.common.text_generation_utils",
        _absents("get_model_parallel_src_rank"),
        "used to talk to a remote critic; ours is in the process",
    ),
    StandIn(
        _NLP + "parts.mixins.nlp_adapter_mixins", _absents("NLPAdapterModelMixin"), "base of NeMo-Aligner's models"
    ),
    StandIn(_NLP + "parts.utils_funcs", _absents("get_last_rank"), "used by NeMo-Aligner's models only"),
    StandIn(
        _NLP + "parts.nlp_overrides",
        _absents("NLPSaveRestoreConnector"),
        "reads and writes .nemo files; checkpoints are ours",
    ),
    StandIn(
        "nemo_aligner.utils.trt_llm",
        _absents("GPTGenerateTRTLLM"),
        "imports TensorRT-LLM 0.13; rollouts come from our engine",
    ),
)

# Modules of NeMo-Aligner that name the CUDA device. On the CPU `torch` in them is platform.cpu_torch(), and its
# `distributed.all_gather_into_tensor` takes a 0-d tensor, which gloo refuses.
ON_CPU = tuple(
    "nemo_aligner." + name
    for name in ("algorithms.supervised", "algorithms.ppo", "utils.distributed", "utils.utils")
)
BARS = ("nemo_aligner.algorithms.supervised", "nemo_aligner.algorithms.ppo")

_installed = False


def install() -> None:
    """Put the stand-ins into sys.modules and make NeMo-Aligner fit for this machine, once per process.

    Raises:
        UserError: NeMo-Aligner or NeMo is not installed here.
    """
    global _installed
    if _installed:
        return
    if importlib.util.find_spec("nemo_aligner") is None or importlib.util.find_spec("nemo") is None:
        raise UserError("nemo_aligner is not installed here: make setup-nemo makes .venv-nemo, which has it")
    with warnings.catch_warnings():
        # NeMo 3 and its libraries announce what they miss of audio and CUDA.
        warnings.simplefilter("ignore")
        for stand_in in STAND_INS:
            _insert(stand_in)
        from nemo.utils import logging

        logging.setLevel(logging.ERROR)
        _quiet_bars()
        if not torch.cuda.is_available():
            _redirect_torch()
    _installed = True


def _insert(stand_in: StandIn) -> None:
    """One module of the table, and the packages above it that are missing as well."""
    module = types.ModuleType(stand_in.module, stand_in.why)
    module.__dict__.update(stand_in.names)
    parent, _, leaf = stand_in.module.rpartition(".")
    if stand_in.module.startswith(_NLP):
        _package(parent)
    sys.modules[stand_in.module] = module
    if parent in sys.modules:
        setattr(sys.modules[parent], leaf, module)


def _package(name: str) -> None:
    """An empty package of this name where none is imported yet, down to nemo.collections."""
    if name in sys.modules or not name.startswith(_NLP.removesuffix(".")):
        return
    package = types.ModuleType(name, "Stands in for a package that NeMo 3 does not have.")
    package.__path__ = []
    sys.modules[name] = package
    parent, _, leaf = name.rpartition(".")
    _package(parent)
    if parent in sys.modules:
        setattr(sys.modules[parent], leaf, package)


def _quiet_bars() -> None:
    """Progress bars on the main rank's terminal alone, as our own are."""
    for name in BARS:
        module = importlib.import_module(name)
        module.tqdm = functools.partial(module.tqdm, disable=None if parallel.is_main() else True)


def _redirect_torch() -> None:
    proxy = platform.cpu_torch()
    distributed = types.ModuleType("torch.distributed")
    distributed.__dict__.update(torch.distributed.__dict__)
    distributed.__dict__["all_gather_into_tensor"] = _at_least_1d(torch.distributed.all_gather_into_tensor)
    proxy.__dict__["distributed"] = distributed
    for name in ON_CPU:
        module = importlib.import_module(name)
        if getattr(module, "torch", None) is not torch:
            raise RuntimeError(f"{name} does not import torch as `torch`: only NeMo-Aligner {VERSION} is supported")
        module.torch = proxy


def _at_least_1d(gather: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(gather)
    def gathered(output: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return gather(output, source.reshape(1) if source.ndim == 0 else source, *args, **kwargs)

    return gathered
