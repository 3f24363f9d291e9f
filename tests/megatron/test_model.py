"""Model, attention, forward and optimizer in one process: what does not need a second rank to be shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from tiny import TINY

from her_nemo.config.errors import UserError
from her_nemo.megatron import forward, optimizer, qwen3
from her_nemo.megatron.attention import SdpaAttention
from her_nemo.megatron.precision import precision


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """q [S, B, H, D], k and v [K, B, G, D], hidden [B, 1, S, K] True where not allowed -> [S, B, H * D]."""
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    scores = torch.einsum("sbhd,kbhd->bhsk", q, k) / q.shape[-1] ** 0.5
    p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bhsk,kbhd->sbhd", p, v).flatten(2)


@pytest.fixture
def attention() -> SdpaAttention:
    config = qwen3.transformer_config(TINY, settings=precision("32"))
    return SdpaAttention(config, 1, AttnMaskType.causal, "self")


def test_attention_causal_grouped(attention: SdpaAttention) -> None:
    q, k, v = torch.randn(6, 2, 4, 16), torch.randn(6, 2, 2, 16), torch.randn(6, 2, 2, 16)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1).expand(2, 1, 6, 6)
    assert torch.allclose(attention(q, k, v), naive_attention(q, k, v, causal), atol=1e-6)


def test_attention_with_cache(attention: SdpaAttention) -> None:
    """New tokens after a cache see all of it: one token in full, several with causality among themselves."""
    q, k, v = torch.randn(6, 2, 4, 16), torch.randn(6, 2, 2, 16), torch.randn(6, 2, 2, 16)
    whole = attention(q, k, v)
    assert torch.allclose(attention(q[-1:], k, v, attn_mask_type=AttnMaskType.no_mask), whole[-1:], atol=1e-6)
    assert torch.allclose(attention(q[-2:], k, v), whole[-2:], atol=1e-6)


def test_attention_with_block_diagonal_and_left_padding_masks(attention: SdpaAttention) -> None:
    q, k, v = torch.randn(6, 2, 4, 16), torch.randn(6, 2, 2, 16), torch.randn(6, 2, 2, 16)
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1).repeat(2, 1, 1, 1)
    hidden[0, 0, 3:, :3] = True
    hidden[1, 0, :, :2] = True
    found = attention(q, k, v, hidden)
    visible = ~hidden[:, 0].all(-1).T
    assert torch.allclose(found[visible], naive_attention(q, k, v, hidden)[visible], atol=1e-6)
    assert torch.isfinite(found).all()


def test_packed_sequences_equal_separate_ones() -> None:
    """A block-diagonal mask keeps packed sequences apart (RoPE is relative)."""
    model = qwen3.build(TINY, trainable=False)
    a, b = torch.randint(0, 101, (1, 9)), torch.randint(0, 101, (1, 7))
    mask = torch.ones(16, 16, dtype=torch.bool).triu(1)
    mask[9:, :9] = True
    packed = {"tokens_BS": torch.cat([a, b], dim=1), "attention_mask": mask[None, None]}
    together = forward.log_probs(model, [packed])[0]
    alone = forward.log_probs(model, [{"tokens_BS": a}, {"tokens_BS": b}])
    assert torch.allclose(together[:, :8], alone[0], atol=1e-5)
    assert torch.allclose(together[:, 9:], alone[1], atol=1e-5)


def nll(said: forward.TokenOutputs, micro_batch: dict) -> tuple:
    mask = micro_batch["mask_BT"]
    return -(said.log_probs_BT * mask).sum(), mask.sum(), {"entropy": said.entropy_BT.detach().sum()}


def gradients(model: qwen3.Model) -> torch.Tensor:
    return torch.cat([p.main_grad.flatten() for p in model.bare().parameters()])


def test_gradients_do_not_depend_on_micro_batching_or_padding() -> None:
    torch.manual_seed(0)
    model = qwen3.build(TINY)
    tokens, mask = torch.randint(0, 101, (6, 12)), (torch.rand(6, 11) < 0.5).float()
    whole = [{"tokens_BS": tokens, "mask_BT": mask}]
    report = forward.forward_backward(model, whole, nll, with_entropy=True)[0]
    assert set(report) == {"entropy", "loss_sum", "count"}
    assert not report["loss_sum"].requires_grad
    first = gradients(model).clone()
    padded_tokens, padded_mask = torch.zeros(6, 15, dtype=torch.long), torch.zeros(6, 14)
    padded_tokens[:, :12], padded_mask[:, :11] = tokens, mask
    pieces = [{"tokens_BS": padded_tokens[i : i + 2], "mask_BT": padded_mask[i : i + 2]} for i in (0, 2, 4)]
    reports = forward.forward_backward(model, pieces, nll, with_entropy=True)
    assert torch.allclose(gradients(model), first, atol=1e-6)
    assert torch.allclose(sum(r["loss_sum"] for r in reports), report["loss_sum"], rtol=1e-5)


def test_a_step_leaves_no_gradient_behind() -> None:
    """The optimizer aliases gradients to the buffer: a second pass must not count them twice."""
    model = qwen3.build(TINY)
    opt = optimizer.optimizer(model, lr=0.0, weight_decay=0.0)
    batch = [{"tokens_BS": torch.randint(0, 101, (2, 8)), "mask_BT": torch.ones(2, 7)}]
    norms = []
    for number in range(3):
        forward.forward_backward(model, batch, nll, with_entropy=True)
        norms.append(optimizer.step(opt, number))
    assert norms[0] == pytest.approx(norms[1]) == pytest.approx(norms[2])


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = qwen3.build(TINY)
    opt = optimizer.optimizer(model, lr=0.1)

    def broken(said: forward.TokenOutputs, micro_batch: dict) -> tuple:
        return said.log_probs_BT.sum() * float("inf"), said.log_probs_BT.numel(), {}

    before = [p.detach().clone() for p in model.bare().parameters()]
    forward.forward_backward(model, [{"tokens_BS": torch.randint(0, 101, (2, 8))}], broken)
    with pytest.raises(FloatingPointError, match="step 4"):
        optimizer.step(opt, 4)
    assert all(torch.equal(a, b) for a, b in zip(before, model.bare().parameters(), strict=True))


def test_weight_decay_spares_norms() -> None:
    opt = optimizer.optimizer(qwen3.build(TINY), lr=0.1, weight_decay=0.5)
    decay = {p.dim(): group["weight_decay"] for group in opt.param_groups for p in group["params"]}
    assert decay == {1: 0.0, 2: 0.5}


def test_evaluate_and_mixed_shapes() -> None:
    model = qwen3.build(TINY)
    batches = [
        {"tokens_BS": torch.randint(0, 101, (2, n)), "mask_BT": torch.ones(2, n - 1)} for n in (8, 8, 5)
    ]
    reports = forward.evaluate(model, batches, nll, with_entropy=True)
    assert [int(r["count"]) for r in reports] == [14, 14, 8]
    assert all(p.grad is None for p in model.bare().parameters())
    with pytest.raises(ValueError, match="one shape"):
        forward.forward_backward(model, batches, nll, with_entropy=True)
    with pytest.raises(ValueError, match="trainable"):
        forward.forward_backward(qwen3.build(TINY, trainable=False), batches[:2], nll)


def test_schedule() -> None:
    opt = optimizer.optimizer(qwen3.build(TINY), lr=1.0)
    schedule = optimizer.scheduler(
        opt, lr=1.0, name="CosineAnnealing", warmup_steps=3, constant_steps=2, min_lr=0.1, max_steps=15
    )
    rates = []
    for _ in range(15):
        assert {group["lr"] for group in opt.param_groups} == {schedule.lr}
        rates.append(schedule.lr)
        schedule.step()
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.55)
    assert rates[-2:] == [0.1, 0.1]
    constant = optimizer.scheduler(opt, lr=2.0)
    assert (constant.lr, constant.lr_at(1000)) == (2.0, 2.0)
    with pytest.raises(UserError, match="warmup_steps=5"):
        optimizer.scheduler(opt, lr=1.0, name="CosineAnnealing", warmup_steps=5, max_steps=5)


def test_layouts_that_do_not_divide_are_all_named() -> None:
    with pytest.raises(UserError) as error:
        qwen3.check_layout(TINY, 3, 4)
    for name in ("num_attention_heads=4", "num_query_groups=2", "ffn_hidden_size=80", "num_layers=2"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "only dense 'qwen3'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
    ],
)
def test_other_architectures_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    config = TINY.to_hf_config() | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(UserError, match=message):
        qwen3.Qwen3Shape.from_hf_dir(tmp_path)
