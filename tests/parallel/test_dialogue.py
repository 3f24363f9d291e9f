"""Multi-turn rollouts: layouts agree, only own turns are trained, and what takes two turns is learnt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from dialogue_checks import GROUP, LINE, REPLY, STARTS, starts
from harness import run
from tiny_qwen3 import tiny_model

from her_nemo.data.tokenizer import train_tokenizer

CHECKS = str(Path(__file__).with_name("dialogue_checks.py"))
TURNS = 3


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `talker`: a small random Qwen3 and a byte-level tokenizer that knows the tests' texts."""
    home = tmp_path_factory.mktemp("dialogue")
    texts = [message["content"] for start in starts() for message in start.messages]
    tokenizer = train_tokenizer([*texts, LINE, "user\nassistant\nsystem\n"] * 8, home / "tokenizer", 320)
    model = tiny_model(
        home / "talker", tokenizer=tokenizer, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(4)  # as initialised, the model would hardly look at what it is asked
    model.save_pretrained(home / "talker")
    return home


@pytest.fixture(scope="session")
def whole(talker: Path) -> dict:
    """What one process makes of the conversations."""
    args = {"directory": str(talker), "turns": TURNS, "layouts": [{"name": "tp1"}]}
    return run(1, f"{CHECKS}:layouts", args)[0]["tp1"]


def rows_in_order(parts: list[list]) -> list:
    """The rows of all replicas by start: replica r has every r-th start, of TURNS x GROUP rows each."""
    size = TURNS * GROUP
    starts_of = [[part[at : at + size] for at in range(0, len(part), size)] for part in parts]
    return [row for one in zip(*starts_of, strict=True) for start in one for row in start]


@pytest.mark.parallel
def test_layouts_agree_and_only_own_turns_are_trained(talker: Path, whole: dict) -> None:
    others = [{"name": "dp2"}, {"name": "tp2", "tensor": 2, "sequence": True}, {"name": "pp2", "pipeline": 2}]
    two = run(2, f"{CHECKS}:layouts", {"directory": str(talker), "turns": TURNS, "layouts": others})
    rows = rows_in_order(whole["replies"])
    assert len(rows) == whole["rows"] == STARTS * TURNS * GROUP
    assert {len(row) for row in rows} == {REPLY}
    assert len({tuple(row) for row in rows}) > len(rows) / 2, "conversations from one start are all the same"
    for name in ("dp2", "tp2", "pp2"):
        seen = [rank[name] for rank in two]
        assert rows_in_order(seen[0]["replies"]) == rows, name
        assert rows_in_order(seen[0]["prompts"]) == rows_in_order(whole["prompts"]), name
        assert seen[0]["replies"] == seen[1]["replies"], name
        assert all(rank["trained_is_reply"] for rank in seen), "the mask covers something else than own turns"
        assert max(rank["gap"] for rank in seen) < 1e-4, "the trainer does not see what the engine saw"
    # The simulator is asked on the first rank of a replica: two attempts for each of its turns.
    assert [rank["dp2"]["asked"] for rank in two] == [4, 4]
    assert [rank["tp2"]["asked"] for rank in two] == [4, 0]
    assert whole["gap"] < 1e-4
    assert whole["version"] == 3


@pytest.mark.parallel
def test_what_stands_in_the_prompts(whole: dict) -> None:
    seen, prompts = whole, whole["prompts"][0]
    for row, prompt in enumerate(prompts):
        start, turn = row // (TURNS * GROUP), row // GROUP % TURNS
        assert f"Good day {start}." in prompt
        # Each of the simulator's earlier turns stands there once, and none of the later ones.
        assert [int(found) for found in re.findall(re.escape(LINE) + r" (\d)", prompt)] == list(range(turn))
    assert seen["tags"]["dialogue/silences"] == 0.0, "a shy simulator was not asked again"
    assert all("hide a ring" not in text for text in seen["seen"]), "inner thoughts reach the simulator"
    assert [len(told["turns"]) for told in seen["transcripts"]] == [2 * TURNS - 1] * STARTS
    assert {told["turns"][1]["speaker"] for told in seen["transcripts"]} == {"Bo"}


def learn(talker: Path, processes: int = 1, **changes: object) -> dict:
    args = {"directory": str(talker), "layout": {"name": "tp1"}, "steps": 40, "lr": 3e-3, "credit": "last"}
    return run(processes, f"{CHECKS}:learn", args | changes, timeout=600)[0]


@pytest.mark.slow
def test_reward_rises_to_an_optimum_that_takes_two_turns(talker: Path) -> None:
    """The reward is told after the second turn, and what the first one has to be is learnt from it all the same."""
    seen = learn(talker, lr=2e-2)
    assert seen["ratios"] == pytest.approx([1.0] * 40, abs=1e-5)
    assert abs(seen["reward"][0] - 0.5) < 0.1
    # Who says the same in both turns stays at 0.5; who learns one turn alone, at 0.75.
    assert sum(seen["reward"][-3:]) / 3 > 0.85, seen["reward"]


@pytest.mark.parallel
def test_credit_is_the_same_on_one_replica_and_on_two(talker: Path) -> None:
    one = learn(talker, steps=3)
    two = learn(talker, processes=2, layout={"name": "dp2"}, steps=3)
    assert any(one["advantages"])
    assert len(one["advantages"]) == STARTS * 2 * GROUP
    assert sorted(two["advantages"]) == pytest.approx(sorted(one["advantages"]), abs=1e-5)
    assert two["reward"] == pytest.approx(one["reward"], abs=1e-6)
