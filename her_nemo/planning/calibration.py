"""Every constant of the planner that is not arithmetic, with where it comes from. Change them here and nowhere else.

Three kinds: data sheets; constants FITTED to a published run (published.py prints what they give for it and, as the
real check, for runs that were not fitted); and ASSUMED ones, which nothing here has measured. No GPU was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 1_000_000_000
GIB = 1 << 30
TERA = 1_000_000_000_000


@dataclass(frozen=True)
class Gpu:
    """One GPU: bytes it reports, dense peak FLOP/s, and bytes/s in one direction of memory and links."""

    name: str
    memory: int
    bf16: float
    fp8: float  # equal to bf16 where there is no FP8
    memory_bandwidth: float
    nvlink: float
    network: float  # per GPU, to other machines


# Memory as nvidia-smi reports it (MiB); peaks without sparsity, bandwidths from NVIDIA's data sheets; NVLink halved to
# one direction. Network: the DGX reference machine's NIC per GPU (HDR 200 Gb/s, else NDR 400 Gb/s).
GPUS = {
    "a100_80gb": Gpu("A100 80 GB SXM", 81_920 << 20, 312 * TERA, 312 * TERA, 2.039 * TERA, 300 * GB, 25 * GB),
    "h100_80gb": Gpu(
        "H100 80 GB SXM", 81_559 << 20, 989.4 * TERA, 1978.9 * TERA, 3.35 * TERA, 450 * GB, 50 * GB
    ),
    "h200_141gb": Gpu(
        "H200 141 GB SXM", 143_771 << 20, 989.4 * TERA, 1978.9 * TERA, 4.8 * TERA, 450 * GB, 50 * GB
    ),
}

# ---------------------------------------------------------------- memory

# ASSUMED: CUDA context and libraries (cuBLAS, cuDNN, Transformer Engine workspaces).
CONTEXT_BYTES = 1_500_000_000
# ASSUMED: NCCL's buffers and channels, per process group of more than one rank.
NCCL_BYTES_PER_GROUP = 400_000_000
# ASSUMED: what the caching allocator cannot use of what it reserved, as a share of the pass's own tensors.
FRAGMENTATION = 0.10
# ASSUMED: a plan that fills more than this share of a GPU is reported as not fitting.
USABLE_SHARE = 0.95

# ---------------------------------------------------------------- training time

# FITTED to Megatron-LM GPT-32B, bf16 (459.6 TFLOP/s per GPU): share of peak that a layer's matrices reach.
MATRIX_EFFICIENCY = 0.523
# FITTED to NeMo 24.12 Llama-2-70B SFT, FP8 (1,816 tokens/s per GPU): the same, as a share of the FP8 peak.
MATRIX_EFFICIENCY_FP8 = 0.493
# FlashAttention-3 (arXiv 2407.08608, figures 5 and 6): causal, head size 128, about 600 TFLOP/s forward and 500
# backward at 4 to 8 k tokens on H100, so about 0.55 of the bf16 peak.
ATTENTION_EFFICIENCY = 0.55
# Large NCCL collectives reach about this share of a link's speed (nccl-tests' bus bandwidth: 370 of 450 GB/s in an
# H100 machine).
COLLECTIVE_EFFICIENCY = 0.80
# ASSUMED: share of the gradient reduction hidden behind the backward pass when overlap is on.
OVERLAP_HIDDEN = 0.80
# ASSUMED: share of tensor-parallel traffic hidden by Transformer Engine's userbuffers (published runs use them).
TENSOR_OVERLAP_HIDDEN = 0.60
# ASSUMED: share of memory bandwidth that norms, residuals and the optimizer reach.
MEMORY_EFFICIENCY = 0.75
# ASSUMED: passes over a hidden state (read or write) outside matrices and attention, per layer, forward.
ELEMENTWISE_PASSES = 14

# ---------------------------------------------------------------- generation time

# FITTED to NeMo-RL 0.4 Llama-3.1-8B GRPO on 16 H100 (97.7 s a step): seconds of one decoding step that do not depend on
# batch or length (scheduling, sampling, launches), in vLLM.
ENGINE_STEP_SECONDS = 0.0037
# ASSUMED: share of memory bandwidth that decoding reaches in reading weights and keys/values.
DECODE_EFFICIENCY = 0.60
# ASSUMED: seconds of one small all-reduce within a machine; a layer has two.
SMALL_ALL_REDUCE_SECONDS = 15e-6
# ASSUMED: seconds a layer takes at least when every kernel is launched from Python (Megatron's modules, no CUDA
# graphs): about 50 launches of 6 microseconds.
EAGER_LAYER_SECONDS = 300e-6
# vLLM's default (scheduler config max_num_seqs on H100).
ENGINE_SEQUENCES = 256
