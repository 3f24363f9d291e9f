"""Makes megatron-core run on CPU over gloo, and leaves it alone where CUDA is available.

megatron-core names the CUDA device in its own modules (`torch.cuda.current_device()`, `device="cuda"`). Here
those modules, and only those, are given a `torch` whose CUDA names lead to the CPU; torch's own namespace stays
untouched and no per-op hook is installed, so tiny models pay nothing for it.
Every change of behaviour is a row of `CHANGES`.
"""

from __future__ import annotations

import functools
import importlib
import logging
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from her_nemo.config.errors import UserError


@dataclass(frozen=True)
class Change:
    """One change made to megatron-core: what is changed, why the CPU needs it, and in which modules."""

    what: str
    why: str
    where: tuple[str, ...]


_CORE = "megatron.core."
_TORCH_USERS = tuple(
    _CORE + name
    for name in (
        "tensor_parallel.layers",
        "tensor_parallel.mappings",
        "tensor_parallel.random",
        "tensor_parallel.utils",
        "tensor_parallel.data",
        "transformer.attention",
        "transformer.transformer_layer",
        "transformer.utils",
        "models.gpt.gpt_model",
        "models.common.embeddings.rotary_pos_embedding",
        "pipeline_parallel.schedules",
        "pipeline_parallel.p2p_communication",
        "distributed.distributed_data_parallel",
        "distributed.param_and_grad_buffer",
        "optimizer.clip_grads",
        "optimizer.distrib_optimizer",
        "optimizer.optimizer",
        "optimizer.grad_scaler",
        "dist_checkpointing.strategies.filesystem_async",
        "dist_checkpointing.strategies.state_dict_saver",
        "parallel_state",
        "utils",
    )
)
_TYPE_CHECKS = (
    (_CORE + "models.common.language_module.language_module", "LanguageModule", "setup_embeddings_and_output_layer"),
    (_CORE + "optimizer.optimizer", "Float16OptimizerWithFloat16Params", "__init__"),
    (_CORE + "optimizer.distrib_optimizer", "DistributedOptimizer", "__init__"),
    (_CORE + "optimizer.distrib_optimizer", "DistributedOptimizer", "get_parameter_state_dp_zero"),
)

CHANGES: tuple[Change, ...] = (
    Change(
        "`torch.cuda.current_device()` is the CPU device; tensor factories asked for `cuda` or pinned memory "
        "make plain CPU tensors; `synchronize` and `empty_cache` do nothing; `torch.cuda` RNG calls use the CPU "
        "generator",
        "buffers, rotary tables, p2p receive tensors, scalars of the schedules and optimizers are made on `cuda`",
        _TORCH_USERS,
    ),
    Change(
        "`_get_cuda_rng_state` and `_set_cuda_rng_state` read and write the CPU generator; the warning that it moved "
        "is not logged",
        "the tensor-parallel RNG tracker and activation recomputation go through CUDA's generators",
        (_CORE + "tensor_parallel.random",),
    ),
    Change(
        "while these methods run, `Tensor.cuda()` returns the tensor itself and `Tensor.type()` names the CUDA type",
        "tied embeddings under pipeline parallelism call `.cuda()`; the mixed-precision and distributed optimizers "
        "accept parameters by the name `torch.cuda.FloatTensor`",
        tuple(f"{module}:{cls}.{method}" for module, cls, method in _TYPE_CHECKS),
    ),
    Change(
        "gradients are clipped with one fused multi-tensor multiplication",
        "the original asserts `torch.cuda.FloatTensor` for every gradient, every step",
        (_CORE + "optimizer.optimizer:clip_grad_by_total_norm_fp32",),
    ),
    Change(
        "Adam is `her_nemo.megatron.cpu_adam.CpuAdam`",
        "distributed-optimizer checkpoints written with torch's AdamW cannot be loaded again: the loader expects "
        "FusedAdam's state layout (`step` in the parameter group)",
        (
            _CORE + "optimizer:Adam",
            _CORE + "optimizer:USING_PYTORCH_OPTIMIZER",
            _CORE + "optimizer.distrib_optimizer:Adam",
            _CORE + "optimizer.distrib_optimizer:HAVE_APEX_OR_TE",
            _CORE + "optimizer.distrib_optimizer:USING_TE_OPTIMIZER",
        ),
    ),
)

_applied = False


def device() -> torch.device:
    """The device that models and batches of this process live on: the current CUDA device, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend that goes with `device()`: "nccl" or "gloo"."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def has_transformer_engine() -> bool:
    """True if Transformer Engine can be used: it is importable and CUDA is available."""
    if not torch.cuda.is_available():
        return False
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    return bool(HAVE_TE)


def require_transformer_engine(what: str) -> None:
    """UserError if `what` was asked for and Transformer Engine cannot be used."""
    if has_transformer_engine():
        return
    if not torch.cuda.is_available():
        raise UserError(f"{what} needs Transformer Engine on a GPU, but torch sees no CUDA here. Leave it out.")
    try:
        importlib.import_module("transformer_engine.pytorch")
        why = "megatron-core does not take it"
    except (ImportError, OSError, RuntimeError) as error:
        why = f"importing it fails: {error}"
    raise UserError(
        f"{what} needs Transformer Engine: {why}. Install it for this torch and CUDA (pip install --no-build-isolation "
        "'transformer-engine[pytorch]', needs nvcc and cuDNN's headers), or leave it out."
    )


def resumable_adam() -> None:
    """Take our Adam also on a GPU that has neither Transformer Engine's nor apex's (see the last of `CHANGES`)."""
    if importlib.import_module(_CORE + "optimizer").USING_PYTORCH_OPTIMIZER:
        _replace_adam()


def apply() -> None:
    """Make the `CHANGES`, once per process. Nothing is changed when CUDA is available."""
    global _applied
    if _applied or torch.cuda.is_available():
        return
    with warnings.catch_warnings():
        # Every fallback that megatron-core announces at import is the one we want on CPU.
        warnings.simplefilter("ignore")
        _redirect_torch()
        _redirect_rng()
        _relax_type_checks()
        _replace_clipping()
        _replace_adam()
    _applied = True


def _is_cuda(where: Any) -> bool:
    return (isinstance(where, str) and where.startswith("cuda")) or (
        isinstance(where, torch.device) and where.type == "cuda"
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def made_on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return made_on_cpu


def cpu_torch() -> types.ModuleType:
    """A module that is `torch` in everything but its CUDA device; it takes the place of `torch` in other modules."""
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    cuda.__dict__.update(
        current_device=lambda: torch.device("cpu"),
        synchronize=lambda *_: None,
        empty_cache=lambda: None,
        manual_seed=torch.manual_seed,
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
    )
    proxy = types.ModuleType("torch")
    proxy.__dict__.update(torch.__dict__)
    proxy.__dict__["cuda"] = cuda
    # torch resolves some names lazily through a module-level __getattr__.
    proxy.__dict__["__getattr__"] = lambda name: getattr(torch, name)
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange"):
        proxy.__dict__[name] = _on_cpu(getattr(torch, name))
    return proxy


def _redirect_torch() -> None:
    proxy = cpu_torch()
    for name in _TORCH_USERS:
        module = importlib.import_module(name)
        if getattr(module, "torch", None) is not torch:
            raise RuntimeError(f"{name} does not import torch as `torch`: this megatron-core is not supported")
        module.torch = proxy


def _redirect_rng() -> None:
    random = importlib.import_module(_CORE + "tensor_parallel.random")

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state


class _PretendCuda(TorchFunctionMode):
    """Answers `.cuda()` and `.type()` as a CUDA tensor would. Only ever active during construction."""

    def __torch_function__(self, func: Any, types_: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        return func(*args, **(kwargs or {}))


def _relax_type_checks() -> None:
    for module_name, class_name, method_name in _TYPE_CHECKS:
        owner = getattr(importlib.import_module(module_name), class_name)
        original = getattr(owner, method_name)

        @functools.wraps(original)
        def pretending(*args: Any, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            with _PretendCuda():
                return _original(*args, **kwargs)

        setattr(owner, method_name, pretending)


def _replace_clipping() -> None:
    def clip(parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
        if use_decoupled_grad:
            raise NotImplementedError("decoupled gradients need Transformer Engine's FusedAdam")
        if isinstance(parameters, torch.Tensor):
            parameters = [parameters]
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        coefficient = max_norm / (total_norm + 1.0e-6)
        if grads and coefficient < 1.0:
            torch._foreach_mul_(grads, coefficient)

    for name in ("optimizer.optimizer", "optimizer.clip_grads"):
        importlib.import_module(_CORE + name).clip_grad_by_total_norm_fp32 = clip


def _replace_adam() -> None:
    from her_nemo.megatron.cpu_adam import CpuAdam

    optimizer = importlib.import_module(_CORE + "optimizer")
    optimizer.Adam = CpuAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed = importlib.import_module(_CORE + "optimizer.distrib_optimizer")
    distributed.Adam = CpuAdam
    distributed.HAVE_APEX_OR_TE = True
    distributed.USING_TE_OPTIMIZER = True
