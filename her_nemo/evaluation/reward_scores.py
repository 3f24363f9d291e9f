"""The scores of a scalar reward model on pairs, from transformers: the head at the reply's last token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3ForSequenceClassification

from her_nemo.config.errors import UserError
from her_nemo.data.loaders import collate_pairs
from her_nemo.data.tokenise import Dropped, Sample, Tokeniser, encode_pair
from her_nemo.rewards.scalar import score_at_last_token

Scores = tuple[float, float]


@torch.no_grad()
def score_pairs(
    model: str | Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_length: int | None = None,
    micro_batch_size: int = 8,
    dtype: str = "auto",
) -> Iterator[Scores | Dropped]:
    """(score of the chosen reply, of the rejected one) of each pair in turn, or why it could not be scored.

    Prompts and replies are encoded as in training, and the score is the scalar head at the reply's last token, in
    fp32.

    Raises:
        UserError: the directory holds no scalar-headed Qwen3.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
        dtype, torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    network, info = Qwen3ForSequenceClassification.from_pretrained(
        model, dtype=kind, local_files_only=True, output_loading_info=True
    )
    if info["missing_keys"] or network.score.out_features != 1:
        raise UserError(
            f"model={model}: no scalar-headed Qwen3 (missing: {', '.join(sorted(info['missing_keys'])) or 'none'}; "
            f"{network.score.out_features} outputs); export a reward model and give that directory"
        )
    network = network.to(device).eval()
    head = network.score.weight.float()
    tokeniser = Tokeniser(Path(model))
    limit = max_length or int(network.config.max_position_embeddings)
    for start in range(0, len(rows), micro_batch_size):
        encoded = [encode_pair(tokeniser, row, limit) for row in rows[start : start + micro_batch_size]]
        whole = [pair for pair in encoded if not isinstance(pair, Dropped)]
        scores = iter(_scores(network, head, whole, tokeniser.pad_id))
        for pair in encoded:
            yield pair if isinstance(pair, Dropped) else next(scores)


def _scores(
    network: Qwen3ForSequenceClassification,
    head_1H: torch.Tensor,
    pairs: Sequence[tuple[Sample, Sample]],
    pad_id: int,
) -> list[Scores]:
    if not pairs:
        return []
    batch = collate_pairs(pairs, pad_id)
    # On the right, padding is never attended to: attention is causal.
    hidden_BSH = network.model(input_ids=batch["tokens_BS"].to(network.device)).last_hidden_state
    values_BS = (hidden_BSH.float() @ head_1H.T).squeeze(-1)
    scores = score_at_last_token(values_BS, batch["lengths_B"].to(values_BS.device)).tolist()
    return list(zip(scores[0::2], scores[1::2], strict=True))
