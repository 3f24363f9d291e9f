"""What each process of a parallel test does: compare this layout with the reference, and return differences."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from megatron.core import parallel_state
from qwen3_reference import BETAS, CLIP, EPS, LR, STEPS, TEMPERATURE, VOCAB, WEIGHT_DECAY
from safetensors.torch import load_file

from her_nemo.config.errors import UserError
from her_nemo.megatron import forward, optimizer, parallel, qwen3, state, weights


def layouts(args: dict) -> dict:
    """Every check at every layout in args["layouts"]: {layout: {check: largest difference}}."""
    directory = Path(args["directory"])
    tensors = load_file(directory / "reference.safetensors")
    numbers = json.loads((directory / "reference.json").read_text())
    results = {}
    for layout in args["layouts"]:
        start(layout)
        found = {}
        for name in args["models"]:
            gaps = _training(directory, name, tensors, numbers, layout)
            if name != "scalar":
                gaps |= _language_model(directory, name, tensors, layout)
            found |= {f"{name}.{key}": value for key, value in gaps.items()}
        results[layout["name"]] = found | _scalar_from_language_model(directory, layout)
    return results


def start(layout: dict) -> None:
    """Take up a layout in a process that may have had another before."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel.initialize(tensor=layout.get("tensor", 1), pipeline=layout.get("pipeline", 1), seed=1)


def build(directory: Path, name: str, layout: dict, **kwargs) -> qwen3.Model:
    kwargs.setdefault("head", "scalar" if name == "scalar" else "lm")
    model = qwen3.build(
        qwen3.Qwen3Shape.from_hf_dir(directory / name),
        sequence_parallel=layout.get("sequence", False),
        make_vocab_size_divisible_by=layout.get("divisible", 8),
        dtype=layout.get("dtype", "32"),
        distributed_optimizer=layout.get("distributed", False) and kwargs.get("trainable", True),
        **({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
           if layout.get("recompute") else {}),
        **kwargs,
    )
    weights.load_hf(model, directory / name)
    return model


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference."""
    if ours.shape != theirs.shape:
        raise AssertionError(f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
    return float((ours.double() - theirs.double()).abs().max()) if ours.numel() else 0.0


def next_token_log_probs(model: qwen3.Model, tokens: torch.Tensor) -> torch.Tensor:
    """log softmax [B, V] after each sequence: ask for every vocabulary entry in turn, as one batch."""
    batch = tokens.shape[0]
    vocab = model.shape.vocab_size
    prefix = tokens.repeat_interleave(vocab, dim=0)
    asked = torch.cat([prefix, torch.arange(vocab).repeat(batch)[:, None]], dim=1)
    return forward.log_probs(model, [{"tokens_BS": asked}])[0][:, -1].view(batch, vocab)


def _language_model(directory: Path, name: str, tensors: dict, layout: dict) -> dict:
    model = build(directory, name, layout, trainable=False)
    tokens = tensors["tokens"][0]
    said = forward.outputs(
        model, [{"tokens_BS": tokens[:4]}, {"tokens_BS": tokens[4:]}], with_entropy=True, temperature=TEMPERATURE
    )
    found = {
        "log_probs": far(torch.cat([out["log_probs_BT"] for out in said]), tensors[f"{name}.log_probs"]),
        "entropy": far(torch.cat([out["entropy_BT"] for out in said]), tensors[f"{name}.entropy"]),
        "logits": far(
            next_token_log_probs(model, tokens[:2]), tensors[f"{name}.logits"][:2, -1].log_softmax(-1)
        ),
    }
    original = load_file(directory / name / "model.safetensors")
    exported = dict(weights.hf_tensors(model))
    if parallel.is_main():
        expected = {key: value for key, value in original.items() if key in weights.hf_shapes(model.shape, "lm")}
        same = set(exported) == set(expected) and all(torch.equal(exported[key], expected[key]) for key in expected)
        found["export_differs"] = 0.0 if same else 1.0
    everywhere = dict(weights.hf_tensors(model, everywhere=True))
    found["everywhere_differs"] = 0.0 if all(torch.equal(everywhere[k], original[k]) for k in everywhere) else 1.0
    return found


def _loss(name: str):
    def loss_fn(said: forward.TokenOutputs, micro_batch: dict) -> tuple:
        mask = micro_batch["mask_BT"]
        if name == "scalar":
            per_token = ((said.values_BS - micro_batch["targets_BS"]) ** 2)[:, 1:]
        else:
            per_token = -said.log_probs_BT
        return (per_token * mask).sum(), mask.sum(), {"sum": (per_token * mask).sum()}

    return loss_fn


def micro_batches(tensors: dict, step: int, size: int = 2) -> list[dict]:
    """This data-parallel rank's share of the step's batch."""
    mine = torch.arange(parallel.data_rank(), tensors["tokens"].shape[1], parallel.data_size())
    return [
        {
            "tokens_BS": tensors["tokens"][step, rows],
            "mask_BT": tensors["mask"][step, rows],
            "targets_BS": tensors["targets"][step, rows],
        }
        for rows in mine.split(size)
    ]


def new_optimizer(model: qwen3.Model):
    return optimizer.optimizer(model, lr=LR, weight_decay=WEIGHT_DECAY, betas=BETAS, eps=EPS, clip_grad=CLIP)


def train_step(model: qwen3.Model, opt, tensors: dict, step: int, name: str) -> tuple[float, float]:
    reports = forward.forward_backward(model, micro_batches(tensors, step), _loss(name))
    total = torch.stack([torch.stack([r["sum"].double(), r["count"].double()]) for r in reports]).sum(0)
    parallel.data_all_reduce(total)
    forward.assert_finite(total[0], step)
    return float(total[0] / total[1]), optimizer.step(opt, step)


def _training(directory: Path, name: str, tensors: dict, numbers: dict, layout: dict) -> dict:
    model = build(directory, name, layout)
    found = {}
    if name == "scalar":
        said = forward.values(model, [{"tokens_BS": tensors["tokens"][0]}])[0]
        found["values"] = far(said, tensors["scalar.values"])
    opt = new_optimizer(model)
    steps = [train_step(model, opt, tensors, step, name) for step in range(STEPS)]
    found["losses"] = far(torch.tensor([s[0] for s in steps]), torch.tensor(numbers[name]["losses"]))
    found["norms"] = far(torch.tensor([s[1] for s in steps]), torch.tensor(numbers[name]["norms"]))
    trained = tensors[f"{name}.trained"]
    if name == "scalar":
        found["trained"] = far(forward.values(model, [{"tokens_BS": tensors["tokens"][0]}])[0], trained[..., 0])
    else:
        ours = forward.log_probs(model, [{"tokens_BS": tensors["tokens"][0]}])[0]
        theirs = trained[:, :-1].log_softmax(-1).gather(-1, tensors["tokens"][0, :, 1:, None]).squeeze(-1)
        found["trained"] = far(ours, theirs)
    return found


def _scalar_from_language_model(directory: Path, layout: dict) -> dict:
    model = build(directory, "tied", layout, head="scalar", trainable=False)
    head = dict(weights.hf_tensors(model, everywhere=True))["score.weight"]
    again = build(directory, "untied", layout, head="scalar", trainable=False)
    other = dict(weights.hf_tensors(again, everywhere=True))["score.weight"]
    return {"new_head_differs": far(head, other), "new_head_norm": abs(float(head.norm()) - 1.0) - 0.5}


# ---------------------------------------------------------------- checkpoints


def save_state(args: dict) -> dict:
    """Train two steps, save, train on: the losses of all steps and the weights at the save."""
    tensors = load_file(Path(args["directory"]) / "reference.safetensors")
    results = {}
    for case in args["cases"]:
        start(case)
        model = build(Path(args["directory"]), case["model"], case)
        opt = new_optimizer(model)
        schedule = optimizer.scheduler(opt, lr=LR, name="CosineAnnealing", warmup_steps=1, max_steps=10)
        for step in range(2):
            train_step(model, opt, tensors, step, case["model"])
            schedule.step()
        torch.rand(3)
        out = Path(args["out"]) / case["name"]
        state.save(out, model, opt, schedule, extra={"step": 2, "note": case["name"]})
        drawn = torch.rand(3).tolist()
        after = []
        for step in range(2, 5):
            after.append(train_step(model, opt, tensors, step, case["model"]))
            schedule.step()
        results[case["name"]] = {"after": after, "drawn": drawn, "lr": schedule.lr}
    return results


def load_state(args: dict) -> dict:
    """Load each checkpoint at each layout and train on."""
    tensors = load_file(Path(args["directory"]) / "reference.safetensors")
    results = {}
    for case in args["cases"]:
        start(case)
        saved = Path(args["out"]) / case["from"]
        model = qwen3.build(
            state.shape_of(saved), head="scalar" if case["model"] == "scalar" else "lm",
            sequence_parallel=case.get("sequence", False), make_vocab_size_divisible_by=case.get("divisible", 8),
            distributed_optimizer=case.get("distributed", False), dtype=case.get("dtype", "32"),
        )
        opt = new_optimizer(model)
        schedule = optimizer.scheduler(opt, lr=LR, name="CosineAnnealing", warmup_steps=1, max_steps=10)
        extra = state.load(saved, model, opt, schedule)
        drawn = torch.rand(3).tolist()
        after = []
        for step in range(2, 5):
            after.append(train_step(model, opt, tensors, step, case["model"]))
            schedule.step()
        results[case["name"]] = {"after": after, "drawn": drawn, "lr": schedule.lr, "extra": extra}
    return results


def vocabulary(args: dict) -> dict:
    """Vocabulary-parallel log-probs and entropy against plain torch, with gradients, also with all-padding ranks."""
    from her_nemo.megatron.log_probs import vocab_parallel_log_probs

    start({"tensor": args["tensor"]})
    group = parallel_state.get_tensor_model_parallel_group()
    worst = {"log_probs": 0.0, "entropy": 0.0, "grad": 0.0, "grad_padding": 0.0}
    for vocab, width, temperature, with_entropy in (
        (VOCAB, 64, 1.0, True),
        (VOCAB, 64, 0.6, True),
        (VOCAB, 64, 1.7, False),
        # The second rank holds nothing but padding.
        (5, 16, 1.0, True),
        (5, 16, 1.0, False),
    ):
        torch.manual_seed(3)
        full = torch.randn(3, 7, width * parallel.tensor_size()) * 4
        target = torch.randint(0, vocab, (3, 7))
        weight, other = torch.randn(3, 7), torch.randn(3, 7)
        theirs = full[..., :vocab].clone().double().requires_grad_()
        p = (theirs / temperature).log_softmax(-1)
        expected, entropy = p.gather(-1, target[..., None])[..., 0], -(p.exp() * p).sum(-1)
        (expected * weight + (entropy * other if with_entropy else 0)).sum().backward()
        start_at = parallel.tensor_rank() * width
        mine = full[..., start_at : start_at + width].clone().requires_grad_()
        found, found_entropy = vocab_parallel_log_probs(
            mine, target, vocab_size=vocab, temperature=temperature, group=group, with_entropy=with_entropy
        )
        (found * weight + (found_entropy * other if with_entropy else 0)).sum().backward()
        count = max(0, min(vocab, start_at + width) - start_at)
        worst["log_probs"] = max(worst["log_probs"], far(found.detach(), expected.detach()))
        if with_entropy:
            worst["entropy"] = max(worst["entropy"], far(found_entropy.detach(), entropy.detach()))
        wanted = theirs.grad[..., start_at : start_at + count]
        worst["grad"] = max(worst["grad"], far(mine.grad[..., :count], wanted))
        worst["grad_padding"] = max(worst["grad_padding"], float(mine.grad[..., count:].abs().sum()))
    return worst


def not_finite(args: dict) -> dict:
    """A loss that is not finite on one rank raises on every rank."""
    start({})
    loss = torch.tensor(float("nan") if parallel.data_rank() == 1 else 1.0)
    try:
        forward.assert_finite(loss, 7)
    except FloatingPointError as error:
        return {"raised": str(error)}
    return {"raised": ""}


def on_main(args: dict) -> dict:
    """Work of the main rank: its result and its error reach all, and the others are told that it goes on."""
    start({})
    parallel.ALIVE_SECONDS = 0.0

    def work(alive) -> int:
        assert parallel.is_main()
        for _ in range(3):
            alive()
        return 7

    def fail(alive) -> None:
        raise UserError("no such file")

    found = parallel.on_main(work)
    try:
        parallel.on_main(fail)
    except UserError as error:
        return {"found": found, "raised": str(error)}
    return {"found": found, "raised": ""}


def bf16(args: dict) -> dict:
    """Train in bf16 with fp32 main parameters at each layout; the gap of the losses to fp32's."""
    tensors = load_file(Path(args["directory"]) / "reference.safetensors")
    numbers = json.loads((Path(args["directory"]) / "reference.json").read_text())
    results = {}
    for layout in args["layouts"]:
        start(layout)
        model = build(Path(args["directory"]), "tied", layout | {"dtype": "bf16-mixed"})
        opt = new_optimizer(model)
        losses = [train_step(model, opt, tensors, step, "tied")[0] for step in range(STEPS)]
        gap = far(torch.tensor(losses), torch.tensor(numbers["tied"]["losses"]))
        results[layout["name"]] = {"losses": gap, "dtype": str(next(model.bare().parameters()).dtype)}
    return results


def fails_on_rank_one(args: dict) -> None:
    """Rank 1 fails while rank 0 waits for it."""
    start({})
    if parallel.data_rank() == 1:
        raise ZeroDivisionError("on purpose")
    parallel.barrier()
