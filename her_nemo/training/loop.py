"""What the supervised loops (SFT, reward model) share: setting up, how long, which rows next, and validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from her_nemo.config.schema import ModelConfig, RewardConfig, SftConfig
from her_nemo.config.sections import LayerWeights, Loop
from her_nemo.data import token_cache
from her_nemo.data.loaders import GlobalBatchSampler, step_micro_batches
from her_nemo.data.packing import packed_micro_batches
from her_nemo.data.sources import RowKind
from her_nemo.data.token_store import TokenStore
from her_nemo.data.tokenise import KIND_NAMES, Sample, Tokeniser
from her_nemo.megatron import parallel
from her_nemo.training.learner import Learner, LossFunction, MicroBatch
from her_nemo.training.run import Run

Rows = Sequence[Sample] | Sequence[tuple[Sample, Sample]]


@dataclass(frozen=True)
class Supervised:
    """What a supervised loop works with: encoded rows, their order, the learner, and the number of its last step."""

    tokeniser: Tokeniser
    train: TokenStore[Any]
    valid: Sequence[Any]
    order: GlobalBatchSampler
    learner: Learner
    last: int


def set_up(cfg: SftConfig | RewardConfig, loop: Loop, here: Run, *, kind: RowKind, head: str) -> Supervised:
    """Encode the rows, find out how long the run is, build and fill the model (collective)."""
    model = cfg.model
    tokeniser = Tokeniser(here.tokenizer)
    length, valid_path = model.encoder_seq_length, model.data.validation_ds.file_path
    train = load_rows(kind, tokeniser, model.data.train_ds.file_path, model, length, here.directory)
    valid = load_rows(kind, tokeniser, valid_path, model, length, here.directory) if valid_path else []
    order = GlobalBatchSampler(len(train), model.global_batch_size, model.seed, model.data.shuffle)
    last = total_steps(loop, len(order))
    learner = Learner.build(
        "model",
        cfg,
        model.optim,
        source=here.source,
        head=head,
        clip_grad=loop.gradient_clip_val,
        max_steps=last,
        peft=getattr(model, "peft", None),
    )
    return Supervised(tokeniser, train, valid, order, learner, last)


def load_rows(
    kind: RowKind, tokeniser: Tokeniser, path: str, cfg: ModelConfig, max_length: int, run_dir: Path
) -> TokenStore[Any]:
    """The encoded rows of one file, through the token cache (collective): the main rank encodes what is not there yet
    and says what was lost on the way, every rank reads.

    Raises:
        UserError: on every rank, for whatever is wrong with the file or the cache.
    """
    cache_dir = cfg.data.cache_dir or run_dir / "cache"

    def encode(alive: Callable[[], None]) -> str:
        entry = token_cache.prepare(
            path, kind, tokeniser, max_length, cache_dir, workers=cfg.data.num_workers, tick=alive
        )
        return str(entry)

    entry = Path(parallel.on_main(encode))
    rows: TokenStore[Any] = token_cache.load(entry, path, max_length, cfg.data.skip_malformed)
    if parallel.is_main():
        bad = rows.malformed.total
        skipped = f", {bad} malformed lines skipped" if bad else ""
        print(f"{path}: {rows.report}{skipped}; {int(rows.lengths.sum())} tokens in {entry}", flush=True)
    return rows


def kind_weights(weights: LayerWeights) -> torch.Tensor:
    """`model.data.layer_weights` as [K] for `masking.weigh_kinds`; tokens without a kind (plain text) weigh 1."""
    return torch.tensor([1.0, *(getattr(weights, KIND_NAMES[code]) for code in sorted(KIND_NAMES))])


def forever(order: GlobalBatchSampler) -> Iterator[np.ndarray]:
    """The batches of epoch after epoch."""
    while True:
        yield from order


class Upcoming:
    """The batches of epoch after epoch, of which the next may be looked at before its turn. A state saved in between
    resumes with that one."""

    def __init__(self, order: GlobalBatchSampler) -> None:
        self._order = order
        self._batches = forever(order)
        self._next: np.ndarray | None = None
        self._before: dict[str, Any] = {}

    def peek(self) -> np.ndarray:
        """The batch that `take` will return next."""
        if self._next is None:
            self._before = self._order.state_dict()
            self._next = next(self._batches)
        return self._next

    def take(self) -> np.ndarray:
        """The next batch."""
        batch, self._next = self.peek(), None
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self._order.state_dict() if self._next is None else self._before

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was saved; before any batch was taken."""
        self._order.load_state_dict(state)


def total_steps(loop: Loop, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: max_epochs, or max_steps where that is sooner."""
    steps = loop.max_epochs * steps_per_epoch
    return steps if loop.max_steps < 0 else min(steps, loop.max_steps)


def my_micro_batches(
    rows: Rows, indices: np.ndarray, cfg: ModelConfig, tokeniser: Tokeniser
) -> list[MicroBatch]:
    """This replica's micro-batches of the global batch `indices`; packed rows if `model.data.packing` says so."""
    share: dict[str, int] = {
        "dp_rank": parallel.data_rank(), "dp_size": parallel.data_size(), "pad_id": tokeniser.pad_id
    }  # fmt: skip
    if getattr(cfg.data, "packing", False):
        capacity = cfg.micro_batch_size * cfg.encoder_seq_length
        return packed_micro_batches(rows, indices, capacity=capacity, **share)
    return step_micro_batches(rows, indices, micro_batch_size=cfg.micro_batch_size, **share)


def validate(
    learner: Learner, rows: Rows, cfg: ModelConfig, loop: Loop, tokeniser: Tokeniser, loss_fn: LossFunction
) -> dict[str, float]:
    """Global sums over the validation rows (collective)."""
    return learner.evaluate(validation_micro_batches(rows, cfg, loop, tokeniser), loss_fn)


def validation_micro_batches(rows: Rows, cfg: ModelConfig, loop: Loop, tokeniser: Tokeniser) -> list[MicroBatch]:
    """This replica's share of the validation rows. Rows that do not fill a batch on every replica are left out:
    replicas must make the same number of forward passes."""
    width = parallel.data_size() * cfg.micro_batch_size
    if len(rows) < width:
        raise ValueError(
            f"{len(rows)} validation rows do not fill one micro-batch of {width} over the replicas"
        )
    batches = max(1, loop.val_batches(len(rows) // width))
    return my_micro_batches(rows, np.arange(batches * width), cfg, tokeniser)
