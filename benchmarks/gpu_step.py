#!/usr/bin/env python
"""One optimizer step of the largest Qwen3 that fits one GPU: ours in bf16 and FP8, and plain transformers beside it.

    python benchmarks/gpu_step.py [--json FILE] [--model qwen3_4b] [--sequence 4096] [--steps 10] [--fp8-recipe delayed]
    python benchmarks/gpu_step.py --device cpu --model qwen3_tiny --sequence 64 --steps 2      the same code, small

Which model is largest is `her-nemo plan`'s answer: the first of the published sizes that fits with any of the planner's
settings. Every line is a process of its own on the same random tokens; what runs out of memory says so. A step is
forward, backward and AdamW on fp32 main weights. Operations are those of the model, recomputation not counted, causal
attention counted once; MFU is against the bf16 peak of the data sheet, for FP8 too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZES = ("qwen3_32b", "qwen3_14b", "qwen3_8b", "qwen3_4b", "qwen3_1_7b", "qwen3_0_6b")
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
# From the most exact and fastest to the smallest.
SETTINGS = (("bf16-mixed", {}), ("bf16-mixed", FULL), ("bf16", FULL))
NO_CUDA = "gpu_step: torch sees no CUDA here. Run it where a GPU is, or small with --device cpu --model qwen3_tiny."
OUT_OF_MEMORY = "out of memory"


# ---------------------------------------------------------------- what is run


def gpu_name(device_name: str) -> str | None:
    """`trainer.gpu` of a device, as torch names it; None for one the planner has no data sheet of."""
    known = {"A100": "a100_80gb", "H100": "h100_80gb", "H200": "h200_141gb"}
    return next((name for mark, name in known.items() if mark in device_name), None)


def plan(model: str, sequence: int, rows: int, precision: str, recompute: dict[str, Any], gpu: str) -> Any:
    """The planner's answer for one configuration on one GPU."""
    from her_nemo.config import compose
    from her_nemo.planning import stages
    from her_nemo.planning.shapes import Shape

    words = [
        "pretrained_checkpoint.restore_from_path=/none", "model.data.train_ds.file_path=/none", f"model={model}",
        "trainer.accelerator=gpu", f"trainer.gpu={gpu}", f"trainer.precision={precision}",
        f"model.encoder_seq_length={sequence}", f"model.micro_batch_size={rows}", f"model.global_batch_size={rows}",
    ]  # fmt: skip
    keys = {name.replace("recompute", "model.activations_checkpoint"): value for name, value in recompute.items()}
    words += [f"{key}={value}" for key, value in keys.items()]
    config = compose.load("sft", words)
    return stages.plan(config, Shape.from_architecture(config.model.architecture()))


def fitting(
    models: tuple[str, ...], sequence: int, rows: int, gpu: str, memory: int
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(model, precision, recomputation) that the planner fits into `memory`, in the order of `models`."""
    from her_nemo.planning import calibration

    for model in models:
        for precision, recompute in SETTINGS:
            needed = plan(model, sequence, rows, precision, recompute, gpu).peak.total
            if needed <= memory * calibration.USABLE_SHARE:
                yield model, precision, recompute


def shape_of(model: str) -> Any:
    """The shape of conf/model/<model>.yaml."""
    from her_nemo.config import compose
    from her_nemo.megatron.qwen3 import Qwen3Shape

    given = ["pretrained_checkpoint.restore_from_path=/none", "model.data.train_ds.file_path=/none", f"model={model}"]
    return Qwen3Shape.from_config(compose.load("sft", given).model)


# ---------------------------------------------------------------- one line, in its process


def tokens_of(work: dict[str, Any], vocab_size: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (work["rows"], work["sequence"]), generator=generator)


def ours(work: dict[str, Any]) -> tuple[Callable[[], float], str]:
    """A step of our own model, and what its layers are made of."""
    import torch

    from her_nemo.megatron import forward, optimizer, parallel, qwen3
    from her_nemo.megatron.precision import Fp8, precision

    parallel.initialize(seed=1)
    settings = precision(work["precision"])
    if work["fp8"]:
        kind = "e4m3" if work["fp8"] in ("blockwise", "mxfp8") else "hybrid"
        settings = replace(settings, fp8=Fp8(kind, work["fp8"]))
    model = qwen3.build(
        shape_of(work["model"]), dtype=settings, distributed_optimizer=True, **work["recompute"]
    )
    opt = optimizer.optimizer(model, lr=1e-5)
    batch = {"tokens_BS": tokens_of(work, model.shape.vocab_size)}

    def nll(said: forward.TokenOutputs, _: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return -said.log_probs_BT.sum(), torch.tensor(said.log_probs_BT.numel()), {}

    def step() -> float:
        report = forward.forward_backward(model, [batch], nll)[0]
        optimizer.step(opt, 0)
        return float(report["loss_sum"] / report["count"])

    return step, "Transformer Engine" if settings.fused else "megatron-core, torch's attention"


def plain(work: dict[str, Any]) -> tuple[Callable[[], float], str]:
    """A step of transformers' model: fp32 weights under autocast, torch's fused AdamW, as its Trainer's bf16."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = shape_of(work["model"])
    where = torch.device(work["device"])
    with where:
        network = Qwen3ForCausalLM(Qwen3Config(**shape.to_hf_config(), attn_implementation="sdpa"))
    network.train()
    if work["recompute"]:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    opt = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    tokens = tokens_of(work, shape.vocab_size).to(where)
    half = work["precision"] != "32"

    def step() -> float:
        opt.zero_grad(set_to_none=True)
        with torch.autocast(where.type, torch.bfloat16, enabled=half):
            loss = network(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        opt.step()
        return float(loss.detach())

    return step, "transformers, fp32 weights under autocast" if half else "transformers, fp32"


def measure(work: dict[str, Any]) -> dict[str, Any]:
    """Time the steps of one line. Seconds are the median's; memory is the most that was allocated."""
    import resource

    import torch

    on_gpu = work["device"] == "cuda"
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    try:
        step, layers = (plain if work["what"] == "transformers" else ours)(work)
        losses, seconds = [], []
        for _ in range(work["warmup"] + work["steps"]):
            wait()
            begin = time.perf_counter()
            losses.append(step())
            wait()
            seconds.append(time.perf_counter() - begin)
    except torch.cuda.OutOfMemoryError as error:
        return {"error": OUT_OF_MEMORY, "said": str(error).splitlines()[0]}
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kept = seconds[work["warmup"] :]
    return {
        "seconds": statistics.median(kept), "slowest": max(kept), "memory_bytes": peak, "layers": layers,
        "first_loss": losses[0], "last_loss": losses[-1],
    }  # fmt: skip


def in_a_process(work: dict[str, Any]) -> dict[str, Any]:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if work["device"] == "cpu" else {}
    done = subprocess.run(
        [sys.executable, __file__, "--line", json.dumps(work)], env=os.environ | hidden, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        return {"error": f"exit code {done.returncode}", "said": done.stderr.strip()[-2000:]}
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- the table


def with_rates(line: dict[str, Any], work: dict[str, Any], gpu: str | None) -> dict[str, Any]:
    """Tokens, operations and the share of the peak per second, from the seconds of a step."""
    from her_nemo.planning import calibration, timing
    from her_nemo.planning.shapes import Shape

    if "seconds" not in line:
        return line
    made = shape_of(work["model"])
    sizes = {name: getattr(made, name) for name in vars(made) if name in Shape.__dataclass_fields__}
    tokens = work["rows"] * work["sequence"]
    flops = timing.model_flops(Shape(**sizes), tokens, work["sequence"]) / line["seconds"]
    peak = calibration.GPUS[gpu].bf16 if gpu and work["device"] == "cuda" else None
    return line | {
        "tokens_per_second": tokens / line["seconds"],
        "tflops": flops / calibration.TERA,
        "mfu": None if peak is None else flops / peak,
    }


def table(report: dict[str, Any]) -> str:
    setting = report["setting"]
    lines = [
        f"{setting['model']} on {report['device']}: {setting['rows']} x {setting['sequence']} tokens a step, "
        f"recomputation {'of all layers' if setting['recompute'] else 'none'}",
        f"{'':22}{'seconds':>9}{'tokens/s':>10}{'TFLOP/s':>9}{'MFU':>7}{'GB':>7}{'loss':>8}",
    ]
    for name, line in report["lines"].items():
        if "error" in line:
            lines.append(f"{name:22}{line['error']}")
            continue
        share = "-" if line["mfu"] is None else f"{line['mfu']:.1%}"
        lines.append(
            f"{name:22}{line['seconds']:9.3f}{line['tokens_per_second']:10,.0f}{line['tflops']:9.1f}{share:>7}"
            f"{line['memory_bytes'] / 1e9:7.1f}{line['last_loss']:8.3f}   {line['layers']}"
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """What ran."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in ("torch", "megatron-core", "transformers", "transformer-engine"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from her_nemo.megatron import platform

    on_gpu = options.device == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    gpu = gpu_name(device)
    chosen: Iterator[tuple[str, str, dict[str, Any]]] = iter([(options.model or "qwen3_tiny", "32", {})])
    if on_gpu:
        memory = torch.cuda.get_device_properties(0).total_memory
        models = SIZES if options.model is None else (options.model,)
        chosen = fitting(models, options.sequence, options.rows, gpu or "h100_80gb", memory)
    # The planner's memory is a count, not a measurement: what does not fit after all gives way to the next.
    line: dict[str, Any] = {"error": OUT_OF_MEMORY, "said": "nothing that the planner knows fits this GPU"}
    work: dict[str, Any] = {}
    for model, precision, recompute in chosen:
        work = {
            "model": model, "precision": options.precision or precision, "fp8": None, "recompute": recompute,
            "rows": options.rows, "sequence": options.sequence, "steps": options.steps, "warmup": options.warmup,
            "device": options.device, "what": "ours",
        }  # fmt: skip
        line = in_a_process(work)
        if line.get("error") != OUT_OF_MEMORY:
            break
    if not work:
        raise SystemExit(f"gpu_step: {line['said']} at {options.sequence} tokens")
    lines: dict[str, dict[str, Any]] = {}
    if on_gpu and platform.has_transformer_engine() and work["precision"] != "32":
        lines[f"ours, fp8 {options.fp8_recipe}"] = work | {"fp8": options.fp8_recipe}
    if not options.no_transformers:
        lines["transformers"] = work | {"what": "transformers"}
    report: dict[str, Any] = {
        "device": device, "gpu": gpu, "versions": versions(), "setting": work,
        "lines": {f"ours, {work['precision']}": with_rates(line, work, gpu)},
    }  # fmt: skip
    for name, what in lines.items():
        report["lines"][name] = with_rates(in_a_process(what), what, gpu)
    return report


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", help="a name of conf/model; default: the largest that fits (cpu: qwen3_tiny)")
    parser.add_argument("--precision", choices=("32", "bf16", "bf16-mixed"), help="default: the planner's (cpu: 32)")
    parser.add_argument("--fp8-recipe", choices=("delayed", "tensorwise", "blockwise", "mxfp8"), default="delayed")
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=1, help="sequences a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--line", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    if options.line:
        print(json.dumps(measure(json.loads(options.line))))
        return 0
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        return 2
    report = run(options)
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    failed = [name for name, line in report["lines"].items() if line.get("error") not in (None, OUT_OF_MEMORY)]
    for name in failed:
        print(f"{name}: {report['lines'][name]['said']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
