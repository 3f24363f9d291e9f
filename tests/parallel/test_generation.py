"""The Megatron engine says what Hugging Face says, with log-probs that the trainer confirms, at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from generation_checks import PROMPTS, STOP
from harness import run

CHECKS = str(Path(__file__).with_name("generation_checks.py"))


@torch.no_grad()
def hugging_face_greedy(directory: Path, length: int = 12) -> list[list[int]]:
    """Greedy replies by plain recomputation of every prefix: no cache, no padding."""
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    replies = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + length and tokens[-1] != STOP:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        replies.append(tokens[len(prompt) :])
    return replies


def assert_engine(processes: int, layouts: list[dict], directory: Path, model: str) -> list[list[int]]:
    expected = hugging_face_greedy(directory / model)
    args = {"directory": str(directory), "model": model, "layouts": layouts}
    sampled: list[list[int]] = []
    for rank, results in enumerate(run(processes, f"{CHECKS}:layouts", args)):
        for layout in layouts:
            found = results[layout["name"]]
            assert found["greedy"] == expected, (layout, rank)
            assert found["gap"] < 1e-4, (layout, rank, found["gap"])
            assert found["same_in_one_batch"], (layout, rank)
            assert found["same_in_two_halves"], (layout, rank)
            assert found["version"] == 3
            assert found["sequence_parallel"] == layout.get("sequence", False), "the engine left a setting changed"
            sampled = sampled or found["sampled"]
            assert found["sampled"] == sampled, (layout, rank)
    return sampled


def test_engine_in_one_process(reference: Path) -> None:
    one = assert_engine(1, [{"name": "tp1"}], reference, "tied")
    assert len({tuple(reply) for reply in one}) > 1


@pytest.mark.parallel
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_engine_in_two_processes(reference: Path, model: str) -> None:
    layouts = [
        {"name": "tp2", "tensor": 2},
        {"name": "tp2_sequence", "tensor": 2, "sequence": True},
        {"name": "pp2", "pipeline": 2},
    ]
    assert_engine(2, layouts, reference, model)


@pytest.mark.parallel
def test_engine_in_four_processes(reference: Path) -> None:
    assert_engine(4, [{"name": "tp2_pp2", "tensor": 2, "pipeline": 2}], reference, "tied")
