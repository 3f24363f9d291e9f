"""A tiny judge that has learnt to write one verdict, and servers' verdicts by a rule, for PPO runs with a judge."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from stage_files import Place
from tiny_qwen3 import tiny_model

from her_nemo.data.tokenise import Tokeniser
from her_nemo.roleplay.judging import candidate, context_of, judge_messages
from her_nemo.roleplay.principles import Dimension, Level
from her_nemo.roleplay.verdict import ChosenPrinciple, Comparison, Verdict, Winner, write_verdict

STEPS, BATCH = 320, 4


def verdict_text(winner: Winner) -> str:
    """A short verdict that parses."""
    chosen = ChosenPrinciple("Style", next(iter(Dimension)), next(iter(Level)), "has it", "it decides")
    return write_verdict(Verdict((chosen,), (Comparison("Style", winner),), "So.", winner))


def rows(world: Path, count: int, seed: int) -> list[list[dict[str, str]]]:
    """Questions about replies of the world, of one or a few words, or of any tokens, as an untrained policy writes."""
    draw = random.Random(seed)
    tokeniser = Tokeniser(world / "tokenizer")
    lines = [json.loads(line) for line in (world / "sft_train.jsonl").read_text().splitlines()]
    found = []
    for _ in range(count):
        *prompt, reply = draw.choice(lines)["messages"]
        words = reply["content"].split()
        said = [reply["content"], " ".join(draw.choices(words, k=draw.randint(1, 12))), draw.choice(words)]
        noise = [tokeniser.decode(draw.choices(range(len(tokeniser.hf)), k=draw.randint(1, 24))) for _ in range(2)]
        shown = noise if draw.random() < 0.5 else [*said, noise[0]]
        first, second = (candidate(text) for text in draw.sample(shown, 2))
        found.append(judge_messages(context_of(prompt), first, second, brief=True))
    return found


def train_judge(place: Place, out: Path, head_dim: int = 16) -> Path:
    """A judge for whom cand_1 is always better, in Hugging Face form."""
    tokeniser = Tokeniser(place.model)
    model = tiny_model(
        out, tokenizer=tokeniser.hf, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=1024,
    )  # fmt: skip
    reply = tokeniser.reply_ids(verdict_text(Winner.CAND_1))
    asked = [tokeniser.prompt_ids(messages) for messages in rows(place.world, STEPS * BATCH, 0)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    model.train()
    for step in range(STEPS):
        chosen = [ids + reply for ids in asked[step * BATCH : (step + 1) * BATCH]]
        longest = max(map(len, chosen))
        tokens = torch.full((BATCH, longest), tokeniser.pad_id)
        labels = torch.full((BATCH, longest), -100)
        for row, ids in enumerate(chosen):
            tokens[row, : len(ids)] = torch.tensor(ids)
            labels[row, len(ids) - len(reply) : len(ids)] = torch.tensor(reply)
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 10) * (1.0 - step / STEPS)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05, loss.item()
    model.eval().save_pretrained(out)
    return out
