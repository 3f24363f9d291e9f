"""The time model against published runs. Some were fitted (their constants say so), the others are the check.

Figures are quoted from the sources ("second-hand": the page itself was not read); what a source leaves out is assumed,
and said in `assumed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from her_nemo.planning import calibration as cal
from her_nemo.planning.memory import Recompute
from her_nemo.planning.shapes import Layout, Shape
from her_nemo.planning.timing import (
    Machine,
    Work,
    decode_step_seconds,
    engine_capacity,
    engine_seconds,
    forward_seconds,
    model_flops,
    train_step,
)

H100 = Machine(cal.GPUS["h100_80gb"])


@dataclass(frozen=True)
class Point:
    """One published figure and the model's answer to it."""

    name: str
    source: str
    unit: str
    published: float
    predict: Callable[[], float]
    fitted: bool = False
    assumed: str = ""

    @property
    def error(self) -> float:
        """predicted / published - 1."""
        return self.predict() / self.published - 1.0


# hidden, ffn, heads, groups, head size, vocabulary: the models' own config files. GPT-32B: 12 x 40 x 8192^2 = 32.2 B.
GPT_32B = Shape(40, 8192, 32768, 64, 64, 128, 51200, tied=True, gated=False, qk_norm=False)
LLAMA_2_70B = Shape(80, 8192, 28672, 64, 8, 128, 32000, qk_norm=False)
LLAMA_3_70B = Shape(80, 8192, 28672, 64, 8, 128, 128256, qk_norm=False)
LLAMA_3_8B = Shape(32, 4096, 14336, 32, 8, 128, 128256, qk_norm=False)
QWEN3_32B = Shape(64, 5120, 25600, 64, 8, 128, 151936)


def _tuned(shape: Shape, layout: Layout, **options: bool) -> Work:
    """NVIDIA's own recipes: all overlaps on."""
    return Work(shape, layout, H100, tensor_overlap=True, parameter_overlap=True, **options)


def _megatron_tflops() -> float:
    layout = Layout(tensor=8, data=48, sequence_parallel=True)
    sequences, length = 48 * 16, 4096
    seconds = train_step(_tuned(GPT_32B, layout), sequences=sequences, length=length).total
    return model_flops(GPT_32B, sequences * length, length, causal=False) / seconds / layout.gpus / cal.TERA


def _tokens_per_second(
    shape: Shape, layout: Layout, *, sequences: int, length: int, fp8: bool = True
) -> float:
    seconds = train_step(_tuned(shape, layout, fp8=fp8), sequences=sequences, length=length).total
    return sequences * length / seconds / layout.gpus


def _grpo_seconds(
    shape: Shape,
    layout: Layout,
    engine_tensor: int,
    mean: float,
    longest: float,
    recompute: Recompute | None = None,
) -> float:
    """NeMo-RL: 2,048 samples in updates of 512; two passes for log-probs (policy, reference), then training."""
    samples, prompt = 2048, 150.0
    work = Work(shape, layout, H100, recompute=recompute or Recompute())
    engines = layout.gpus // engine_tensor
    engine = Work(shape, Layout(tensor=engine_tensor), H100)
    generation = engine_seconds(
        engine, sequences=samples / engines, prompt=prompt, reply=mean - prompt, longest=longest - prompt,
        concurrent=engine_capacity(engine, mean, memory_share=0.6),
    )  # fmt: skip
    scoring = 2 * forward_seconds(work, sequences=samples, length=mean)
    return generation + scoring + 4 * train_step(work, sequences=512, length=mean).total


# NeMo-Aligner's workload is not in the figures at hand: 1,024 samples in TensorRT-LLM batches of 8, each of which runs
# as long as its longest reply. That length, and the seconds a step that no number of nodes takes away (weights to the
# engine, exchanges with the critic), are FITTED to the times on 12 and 96 nodes.
ALIGNER_LONGEST, ALIGNER_FIXED = 1550, 12.0
ALIGNER_PROMPT, ALIGNER_SAMPLES, ALIGNER_BATCH = 200, 1024, 8


def _aligner_seconds(nodes: int) -> float:
    """Two thirds of the nodes hold the actor (TP8 PP2), a third the critic, whose work hides behind the rollout."""
    gpus = nodes * 8 * 2 // 3
    layout = Layout(8, 2, gpus // 16, sequence_parallel=True)
    work = Work(LLAMA_3_70B, layout, H100)
    step = decode_step_seconds(
        Work(LLAMA_3_70B, Layout(tensor=4), H100), batch=ALIGNER_BATCH, context=ALIGNER_PROMPT + ALIGNER_LONGEST / 2,
        step_seconds=cal.ENGINE_STEP_SECONDS, layer_seconds=0.0,
    )  # fmt: skip
    generation = math.ceil(ALIGNER_SAMPLES / (gpus // 4) / ALIGNER_BATCH) * ALIGNER_LONGEST * step
    length = ALIGNER_PROMPT + ALIGNER_LONGEST
    scoring = 2 * forward_seconds(work, sequences=ALIGNER_SAMPLES, length=length)
    training = train_step(work, sequences=ALIGNER_SAMPLES, length=length).total
    return ALIGNER_FIXED + generation + scoring + training


NEMO_24_12 = "NeMo Framework user guide 24.12, performance summary, H100, FP8"
NEMO_RL = "NeMo-RL 0.4, docs/about/performance-summary.md, GRPO on H100, bf16"
ALIGNER = "NeMo-Aligner 70B PPO (arXiv 2405.01481), second-hand"
PP4 = "global batch as in the table, micro-batch 1"

POINTS: tuple[Point, ...] = (
    Point("Megatron-LM GPT-32B TP8 DP48 4096", "Megatron-LM, second-hand", "TFLOP/s/GPU", 459.6,
          _megatron_tflops, fitted=True, assumed="40 layers of 8192, 16 sequences a replica, all overlaps"),
    Point("Llama-2-70B SFT FP8 TP4 PP4, 16 GPUs", NEMO_24_12, "tokens/s/GPU", 1816,
          lambda: _tokens_per_second(LLAMA_2_70B, Layout(4, 4, 1, True, virtual=5), sequences=32, length=4096),
          fitted=True, assumed="VP5"),
    Point("Llama-3-70B SFT FP8 TP4 PP4 VP5, 32 GPUs", "NeMo Framework, second-hand",
          "tokens/s/GPU", 1638,
          lambda: _tokens_per_second(LLAMA_3_70B, Layout(4, 4, 2, True, virtual=5), sequences=32, length=4096),
          assumed="global batch 32, micro-batch 1"),
    Point("Llama-2-70B pretraining FP8 TP4 PP4 VP20, 64 GPUs", NEMO_24_12, "tokens/s/GPU", 1728,
          lambda: _tokens_per_second(LLAMA_2_70B, Layout(4, 4, 4, True, virtual=20), sequences=128, length=4096),
          assumed=PP4),
    Point("Llama-3-70B pretraining FP8 TP4 PP4 CP2 VP5, 64 GPUs", NEMO_24_12, "tokens/s/GPU", 1524,
          lambda: _tokens_per_second(LLAMA_3_70B, Layout(4, 4, 2, True, 5, 2), sequences=128, length=8192),
          assumed=PP4),
    Point("NeMo-RL GRPO Llama-3.1-8B, 16 GPUs", NEMO_RL, "s/step", 97.7,
          lambda: _grpo_seconds(LLAMA_3_8B, Layout(1, 2, 8), 1, 1060, 4096, Recompute("full", "uniform", 1)),
          fitted=True, assumed="prompts of 150"),
    Point("NeMo-RL GRPO Qwen3-32B, 32 GPUs (3,206 tokens)", NEMO_RL, "s/step", 393,
          lambda: _grpo_seconds(QWEN3_32B, Layout(4, 4, 2, True), 4, 3206, 4096), assumed="prompts of 150"),
    Point("NeMo-RL GRPO Qwen3-32B, 32 GPUs (3,251 tokens)", "a later NeMo-RL, second-hand",
          "s/step", 376, lambda: _grpo_seconds(QWEN3_32B, Layout(4, 4, 2, True), 4, 3251, 4096),
          assumed="prompts of 150"),
    *(Point(f"NeMo-Aligner PPO 70B, {nodes} nodes", ALIGNER, "s/step", seconds,
            lambda nodes=nodes: _aligner_seconds(nodes), fitted=nodes in (12, 96),
            assumed="1,024 samples in batches of 8, longest reply and fixed seconds fitted; actor on 2/3 of the nodes")
      for nodes, seconds in ((12, 366.7), (24, 190.4), (48, 108.0), (96, 56.9))),
)  # fmt: skip


def table() -> str:
    """Published, predicted and error of every point, one line each."""
    lines = [f"{'':8}{'run':58}{'published':>11}{'predicted':>11}{'error':>8}  unit"]
    for point in POINTS:
        kind = "fitted" if point.fitted else "check"
        predicted = point.predict()
        lines.append(
            f"{kind:8}{point.name:58}{point.published:11.1f}{predicted:11.1f}{point.error:+8.1%}  {point.unit}"
        )
    return "\n".join(lines)
