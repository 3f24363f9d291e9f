"""Files of any known format -> conversations, samples, pairs and splits as Parquet, with a data card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from her_nemo.config.data import IngestConfig
from her_nemo.data.ingest import ingest


def run(cfg: IngestConfig) -> int:
    card = ingest(cfg)
    out = Path(cfg.out)
    print((out / "card.md").read_text(encoding="utf-8"))
    print(last_words(card["ledger"]))
    print(f"Data: {out}/   Card: {out / 'card.md'}   Quarantine: {out / 'quarantine.jsonl'}")
    return 0


def last_words(ledger: dict[str, Any]) -> str:
    """The balance in one line."""
    return (
        f"turns: {ledger['turns_in']} in = {ledger['turns_out']} used + {ledger['turns_quarantined']} quarantined, "
        f"{ledger['unexplained']} unexplained"
    )
