"""What each process of the LoRA tests does: train adapters at a layout, save, resume, load elsewhere, gather merged."""

from __future__ import annotations

from pathlib import Path

import torch
from qwen3_checks import build, far, new_optimizer, start, train_step
from safetensors.torch import load_file, save_file

from her_nemo.config.lora import Lora, expand
from her_nemo.megatron import adapters, forward, optimizer, parallel, qwen3, state, weights

LORA = Lora(expand(["all"]), rank=4, alpha=8.0)
STEPS, HALF = 4, 2


def layouts(args: dict) -> dict:
    """{layout: what was found there} for every layout in args["layouts"]. The first process alone writes what the
    others compare with (args["write"])."""
    directory, out = Path(args["directory"]), Path(args["out"])
    tensors = load_file(directory / "reference.safetensors")
    return {layout["name"]: _layout(directory, out, tensors, layout, args["write"]) for layout in args["layouts"]}


def _layout(directory: Path, out: Path, tensors: dict, layout: dict, write: bool) -> dict:
    start(layout)
    model = _model(directory, layout)
    base = {name: value.clone() for name, value in model.bare().named_parameters() if not adapters.is_adapter(name)}
    probe = {"tokens_BS": tensors["tokens"][0]}
    plain = forward.log_probs(build(directory, "tied", layout, trainable=False), [probe])[0]
    found = {"initial": far(forward.log_probs(model, [probe])[0], plain)}
    opt = new_optimizer(model)
    first = [train_step(model, opt, tensors, step, "tied") for step in range(HALF)]
    where = out / f"step_{layout['name']}"
    state.save(where, model, opt, optimizer.scheduler(opt, lr=1e-3))
    rest = [train_step(model, opt, tensors, step, "tied") for step in range(HALF, STEPS)]
    found |= {"losses": [loss for loss, _ in first + rest], "norms": [norm for _, norm in first + rest]}
    found["resumed"] = _resumed(directory, where, tensors, layout) == rest
    found["elsewhere"] = [loss for loss, _ in _resumed(directory, out / "step_tp1", tensors, layout)]
    found["base_moved"] = max(far(value, base[name]) for name, value in model.bare().named_parameters() if name in base)
    found["replicas_differ"] = _replicas_differ(model)
    found["off"] = far(forward.log_probs(adapters.without(model), [probe])[0], plain)
    beside = forward.log_probs(model, [probe])[0]
    merged = dict(weights.hf_tensors(model, everywhere=True))
    if write:
        save_file({name: value.clone() for name, value in merged.items()}, out / "merged.safetensors")
    wanted = load_file(out / "merged.safetensors")
    found["merged"] = max(far(merged[name], wanted[name]) for name in wanted)
    alone = build(directory, "tied", layout, trainable=False)
    weights.load_tensors(alone, _Named(merged))
    found["merged_log_probs"] = far(forward.log_probs(alone, [probe])[0], beside)
    found["learned"] = far(beside, plain)
    return found


def _model(directory: Path, layout: dict) -> qwen3.Model:
    return build(directory, "tied", layout, lora=LORA)


def _resumed(directory: Path, where: Path, tensors: dict, layout: dict) -> list[tuple[float, float]]:
    """The steps after the first half, from a checkpoint of whatever layout."""
    model = _model(directory, layout)
    opt = new_optimizer(model)
    # A checkpoint of one optimizer is not the other's.
    same = state.about(where)["distributed_optimizer"] == model.distributed_optimizer
    state.load(where, model, opt if same else None)
    return [train_step(model, opt, tensors, step, "tied") for step in range(HALF, STEPS)] if same else []


def _replicas_differ(model: qwen3.Model) -> float:
    """Largest difference over tensor-parallel ranks of the matrices that each has whole."""
    worst = 0.0
    for adapter in adapters.adapters_of(model).values():
        whole = (adapter.lora_a if adapter.column else adapter.lora_b).detach()
        parts = [torch.empty_like(whole) for _ in range(parallel.tensor_size())]
        torch.distributed.all_gather(parts, whole, group=parallel.tensor_group())
        worst = max([worst, *(far(part, parts[0]) for part in parts)])
    return worst


class _Named:
    """Tensors by name, as `weights.load_tensors` reads them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._tensors[name][start:stop]

    def close(self) -> None:
        self._tensors = {}
