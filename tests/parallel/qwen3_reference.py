"""What Hugging Face and plain torch say: tiny Qwen3 models, their logits, and their training with AdamW."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

STEPS, BATCH, LENGTH, VOCAB = 6, 8, 17, 101
LR, WEIGHT_DECAY, BETAS, EPS, CLIP = 5e-3, 0.1, (0.9, 0.95), 1e-8, 1.0
TEMPERATURE = 0.7


def make(directory: Path) -> None:
    """Write HF models `tied`, `untied`, `scalar`, `one_group`, and `reference.safetensors` and `.json`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokens = torch.randint(0, VOCAB, (STEPS, BATCH, LENGTH))
    mask = (torch.rand(STEPS, BATCH, LENGTH - 1) < 0.6).float()
    targets = torch.randn(STEPS, BATCH, LENGTH)
    tensors = {"tokens": tokens, "mask": mask, "targets": targets}
    numbers = {}
    for name in ("tied", "untied", "scalar", "one_group"):
        config = Qwen3Config(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1 if name == "one_group" else 2, head_dim=16, tie_word_embeddings=name == "tied",
            rope_theta=10000.0, max_position_embeddings=64, attn_implementation="sdpa",
        )
        model = Qwen3ForCausalLM(config).eval()
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.data = parameter.data + 0.2 * noise if "norm" in key else parameter.data * 4
        model.save_pretrained(directory / name)
        head = torch.nn.Parameter(torch.randn(1, 48) / 48**0.5) if name == "scalar" else None
        if head is not None:
            _add_score(directory / name, head)
        with torch.no_grad():
            hidden = model.model(tokens[0]).last_hidden_state
            tensors[f"{name}.hidden"] = hidden
            if head is None:
                logits = model.lm_head(hidden)
                tensors[f"{name}.logits"] = logits
                p = (logits[:, :-1] / TEMPERATURE).log_softmax(-1)
                tensors[f"{name}.log_probs"] = p.gather(-1, tokens[0, :, 1:, None]).squeeze(-1)
                tensors[f"{name}.entropy"] = -(p.exp() * p).sum(-1)
            else:
                tensors[f"{name}.values"] = (hidden @ head.T).squeeze(-1)
        numbers[name] = _train(model, head, tokens, mask, targets)
        with torch.no_grad():
            hidden = model.model(tokens[0]).last_hidden_state
            tensors[f"{name}.trained"] = hidden @ head.T if head is not None else model.lm_head(hidden)
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / "reference.safetensors")
    (directory / "reference.json").write_text(json.dumps(numbers))


def _add_score(directory: Path, head: torch.Tensor) -> None:
    from safetensors.torch import load_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("lm_head.weight")
    save_file(tensors | {"score.weight": head.detach().clone()}, file, metadata={"format": "pt"})


def _train(model, head, tokens, mask, targets) -> dict[str, list[float]]:
    parameters = [parameter for key, parameter in model.named_parameters() if key != "lm_head.weight" or head is None]
    parameters += [head] if head is not None else []
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LR, betas=BETAS, eps=EPS,
    )
    losses, norms = [], []
    for step in range(STEPS):
        if head is None:
            p = model(tokens[step]).logits[:, :-1].log_softmax(-1)
            per_token = -p.gather(-1, tokens[step, :, 1:, None]).squeeze(-1)
        else:
            values = (model.model(tokens[step]).last_hidden_state @ head.T).squeeze(-1)
            per_token = ((values - targets[step]) ** 2)[:, 1:]
        loss = (per_token * mask[step]).sum() / mask[step].sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms}
