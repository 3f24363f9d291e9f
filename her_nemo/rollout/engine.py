"""What every rollout engine does: token ids in, token ids with their log-probs out.

The training loops know this protocol alone. Behind it stand the trainer's own Megatron model
(`megatron_engine`), vLLM servers (`server_engine`) and, for evaluation, vLLM in this process (`vllm_engine`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities sum to at least this; 1.0 keeps all.
        max_tokens: longest reply, in tokens, the stop token included.
        min_tokens: no stop token is drawn before this many tokens.
        stop_ids: tokens that end a reply.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            text
            for wrong, text in (
                (self.temperature < 0, f"temperature is {self.temperature}; it must be 0 or more"),
                (self.top_k < 0, f"top_k is {self.top_k}; it must be 0 (keep all) or more"),
                (not 0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1"),
                (self.max_tokens < 1, f"max_tokens is {self.max_tokens}; it must be 1 or more"),
                (
                    not 0 <= self.min_tokens <= self.max_tokens,
                    f"min_tokens is {self.min_tokens}; it must be from 0 to max_tokens ({self.max_tokens})",
                ),
            )
            if wrong
        ]
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))


@dataclass
class Rollout:
    """Replies of one `generate` call; entry i of every list belongs to prompt i.

    Attributes:
        prompt_ids: the prompts as given.
        response_ids: the tokens drawn, the stop token included where one was drawn.
        log_probs: log-prob of each drawn token (same lengths as `response_ids`), natural logarithm, under
            softmax(logits / temperature); at temperature 0, under softmax(logits).
        weight_version: version of the weights that generated them.
        finished: False where `max_tokens` cut the reply.
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    log_probs: list[list[float]]
    weight_version: int
    finished: list[bool]

    @classmethod
    def empty(cls, prompts: list[list[int]], *, weight_version: int) -> Rollout:
        """A rollout with a place for every prompt and nothing generated yet."""
        return cls(
            prompt_ids=prompts,
            response_ids=[[] for _ in prompts],
            log_probs=[[] for _ in prompts],
            weight_version=weight_version,
            finished=[False] * len(prompts),
        )

    @property
    def response_tokens(self) -> int:
        """Tokens drawn, over all replies."""
        return sum(len(ids) for ids in self.response_ids)


class RolloutEngine(Protocol):
    """Anything that can sample replies from the current policy."""

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seed: int,
        *,
        indices: Sequence[int] | None = None,
    ) -> Rollout:
        """Sample one reply a prompt.

        Reply i depends on (weights, prompt i, sampling, seed, indices[i]) and not on which prompts share its
        batch, up to floating-point rounding. `indices` numbers the prompts in the whole job where `prompts`
        is one replica's part of it, so that samples do not change with the number of replicas; None: 0, 1, ...
        """
        ...

    def update_weights(self, named: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Take over the trainer's weights, given as Hugging Face names and whole tensors."""
        ...


class TrainingEngine(RolloutEngine, Protocol):
    """A rollout engine inside a training loop.

    Attributes:
        staleness: updates of the weights between those that the last rollout came from and the present ones.
    """

    staleness: int

    def start(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seed: int,
        indices: Sequence[int] | None = None,
    ) -> None:
        """Begin a rollout with the present weights beside training; `generate` with the same arguments returns it.

        An `update_weights` in between waits for it, so the rollout is at most one update stale.
        """
        ...

    def rest(self) -> None:
        """Nothing will be generated until the next call: what is beside the trainer on its devices makes room for it.
        Collective over all ranks."""
        ...

    def tags(self) -> dict[str, float]:
        """What the last sync and the last rollout have to report, for the log."""
        ...
