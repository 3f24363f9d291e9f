"""LoRA from training to both kinds of export: what transformers and peft compute is what Megatron trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_files import load
from safetensors.torch import load_file, save_file
from stage_files import Place, curve, summary

from her_nemo.config.errors import UserError
from her_nemo.megatron import forward, parallel, qwen3_map
from her_nemo.megatron.torch_dist import TorchDist
from her_nemo.stages import export, ppo, sft, verify
from her_nemo.training import source as sources

TUNING = ["model.peft.lora_tuning.target_modules=[all]", "model.peft.lora_tuning.alpha=8.0"]


def sft_config(place: Place, out: Path, *overrides: str, base: Path | None = None) -> Any:
    return words(
        "sft",
        f"model.data.train_ds.file_path={place.world / 'sft_train.jsonl'}",
        f"pretrained_checkpoint.restore_from_path={base or place.model}",
        f"exp_manager.explicit_log_dir={out}",
        "model.encoder_seq_length=384", "model.micro_batch_size=2", "model.global_batch_size=4",
        "model.optim.lr=2e-2", "trainer.sft.max_steps=6", "model.peft.peft_scheme=lora",
        "model.peft.lora_tuning.adapter_dim=4", *TUNING, *overrides,
    )  # fmt: skip


def words(stage: str, *overrides: str) -> Any:
    from her_nemo.config import compose

    return compose.load(stage, list(overrides))


@pytest.fixture(scope="module")
def trained(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a LoRA SFT over a base of its own."""
    home = tmp_path_factory.mktemp("lora")
    shutil.copytree(place.model, home / "base")
    assert sft.run(sft_config(place, home / "run", base=home / "base")) == 0
    losses = curve(home / "run", "train/loss")
    assert losses[-1] < losses[0] - 0.1
    return home / "run"


def beside(run: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Megatron's logits with the adapters beside the base's weights, as they were trained."""
    parallel.initialize(seed=1)
    try:
        source = sources.locate(run)
        layout = words("export", "checkpoint=x", "out=x").model
        model = sources.build(
            source.base, layout, "32", head="lm", trainable=False, lora=source.lora, adapters=source
        )
        return forward.logits(model, tokens).cpu()
    finally:
        parallel.destroy()


def probe(vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (3, 40), generator=torch.Generator().manual_seed(11))


@pytest.mark.slow
def test_merged_export_is_what_megatron_trained(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from transformers import Qwen3ForCausalLM

    out = tmp_path / "hf"
    assert export.run(load("export", checkpoint=trained, out=out, dtype="float32", shard_bytes=60_000)) == 0
    body = json.loads((out / "proof.json").read_text())
    assert body["logits_max_abs_diff"] < 1e-4
    assert body["merging_max_abs_diff"] < 1e-4
    assert body["top1_agreement"] == 1.0
    network = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
    tokens = probe(network.config.vocab_size)
    with torch.no_grad():
        theirs = network(input_ids=tokens).logits
        plain = Qwen3ForCausalLM.from_pretrained(trained.parent / "base", dtype=torch.float32).eval()(tokens).logits
    ours = beside(trained, tokens)
    assert float((theirs - ours).abs().max()) < 1e-4
    assert float((plain - ours).abs().max()) > 0.02
    # Layer by layer, and rounded to bf16, it holds too; and the run is itself a source that is merged.
    bf16 = tmp_path / "bf16"
    assert export.run(load("export", checkpoint=trained, out=bf16, proof="layers")) == 0
    assert json.loads((bf16 / "proof.json").read_text())["largest_relative_difference"] < 1e-5
    assert verify.run(load("verify", a=trained, b=out)) == 0
    assert verify.run(load("verify", a=trained, b=bf16)) == 0
    assert verify.run(load("verify", a=trained, b=trained.parent / "base")) == 1
    said = capsys.readouterr().out
    assert "equal bit for bit" in said
    assert "equal after rounding to bfloat16" in said


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "layers"])
def test_adapter_export_holds_the_adapters(how: str, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    assert export.run(load("export", checkpoint=trained, out=out, lora="adapter", dtype="float32", proof=how)) == 0
    body = json.loads((out / "proof.json").read_text())
    assert body.get("logits_max_abs_diff", body.get("largest_relative_difference")) < 1e-4
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    tensors = load_file(out / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.1."
    assert len(tensors) == 2 * 2 * 7
    assert tensors[layer + "self_attn.k_proj.lora_B.weight"].shape == (32, 4)
    assert tensors[layer + "mlp.up_proj.lora_B.weight"].shape == (96, 4)
    shared = [tensors[f"{layer}self_attn.{name}_proj.lora_A.weight"] for name in "qkv"]
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[0], shared[2])


@pytest.mark.slow
def test_peft_loads_the_adapter_with_the_same_logits(trained: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'her-nemo[dev]'")
    from transformers import Qwen3ForCausalLM

    for name in ("adapter", "merged"):
        assert export.run(load("export", checkpoint=trained, out=tmp_path / name, lora=name, dtype="float32")) == 0
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    plain = Qwen3ForCausalLM.from_pretrained(settings["base_model_name_or_path"], dtype=torch.float32)
    network = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    merged = Qwen3ForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    tokens = probe(merged.config.vocab_size)
    with torch.no_grad():
        said, theirs = network(input_ids=tokens).logits, merged(tokens).logits
    assert float((said - theirs).abs().max()) < 1e-4
    assert float((said - beside(trained, tokens)).abs().max()) < 1e-4


@pytest.mark.slow
def test_a_wrong_map_of_rows_is_caught(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key and value exchanged wherever adapters are read as Hugging Face's, but not in the live model."""
    from her_nemo.megatron import adapter_files

    right = qwen3_map.spans

    def exchanged(entry: qwen3_map.Entry, shape: Any, rows: int) -> list[qwen3_map.Span]:
        names = dict(zip(entry.names[1:], entry.names[:0:-1], strict=True)) if entry.kind == "qkv" else {}
        return [
            qwen3_map.Span(names.get(span.name, span.name), span.start, span.row, span.count)
            for span in right(entry, shape, rows)
        ]

    monkeypatch.setattr(adapter_files, "spans", exchanged)
    for lora, said in (("merged", "merging the adapters changes outputs"), ("adapter", "outputs differ by")):
        with pytest.raises(UserError, match=said):
            export.run(load("export", checkpoint=trained, out=tmp_path / lora, lora=lora, dtype="float32"))
        assert not (tmp_path / lora).exists()


@pytest.mark.slow
def test_resume_gives_the_same_bits_and_refuses_other_adapters(place: Place, trained: Path, tmp_path: Path) -> None:
    run, base = tmp_path / "cut", trained.parent / "base"
    dropout = "model.peft.lora_tuning.adapter_dropout=0.1"
    for out, steps in ((tmp_path / "whole", (6,)), (run, (3, 6))):
        for last in steps:
            assert sft.run(sft_config(place, out, dropout, f"trainer.sft.max_steps={last}", base=base)) == 0
    assert curve(run, "train/loss") == curve(tmp_path / "whole", "train/loss")
    assert curve(run, "train/loss") != curve(trained, "train/loss")
    one, other = (_adapters(where) for where in (run, tmp_path / "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed = tmp_path / "other"
    shutil.copytree(base, changed)
    weights = load_file(changed / "model.safetensors")
    save_file({key: value * 1.5 for key, value in weights.items()}, changed / "model.safetensors", {"format": "pt"})
    for overrides, where, said in (
        (["model.peft.lora_tuning.adapter_dim=8"], base, "rank is 4"),
        (["model.peft.peft_scheme=none"], base, "has LoRA adapters, the model configured has none"),
        ([], changed, "belong to"),
    ):
        with pytest.raises(UserError, match=said):
            sft.run(sft_config(place, run, "trainer.sft.max_steps=8", *overrides, base=where))


def _adapters(run: Path) -> dict[str, torch.Tensor]:
    held = TorchDist(next(run.glob("checkpoints/step_00000006")) / "model")
    keys = [key for key in held.keys() - {""} if key.startswith("decoder.")]
    return {f"{key}.{layer}": held.rows(key, layer, 0, held.shape(key)[1]) for key in keys for layer in range(2)}


@pytest.mark.slow
def test_a_base_that_moved_or_changed_is_said(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    manifest = next((tmp_path / "run").glob("checkpoints/step_*/manifest.json"))
    body = json.loads(manifest.read_text())
    body["models"]["model"]["base"]["path"] = str(tmp_path / "gone")
    manifest.write_text(json.dumps(body))
    with pytest.raises(UserError, match="no longer at"):
        sources.locate(tmp_path / "run")
    found = sources.locate(tmp_path / "run", base=trained.parent / "base")
    assert found.base.path == trained.parent / "base"
    wrong = tmp_path / "wrong"
    assert export.run(load("export", checkpoint=trained, out=wrong)) == 0
    with pytest.raises(UserError, match="of another model than the one at"):
        sources.locate(tmp_path / "run", base=wrong)


def ppo_config(place: Place, out: Path, *overrides: str) -> Any:
    return words(
        "ppo",
        f"model.data.train_ds.file_path={place.world / 'prompts_train.jsonl'}",
        f"reward.restore_from_path={place.model}",
        f"exp_manager.explicit_log_dir={out}",
        "model.encoder_seq_length=384", "model.micro_batch_size=2", "model.global_batch_size=4",
        "model.optim.lr=1e-2", "critic.optim.lr=1e-3", "model.ppo.num_rollout_samples=8", "model.ppo.num_val_samples=0",
        "model.ppo.length_params.max_length=12", "trainer.ppo.critic_warmup_steps=1", "trainer.ppo.max_steps=2",
        "model.peft.peft_scheme=lora", "model.peft.lora_tuning.adapter_dim=4", *TUNING, *overrides,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("start", ["nothing", "adapters"])
def test_ppo_starts_at_its_reference_and_moves_away(start: str, place: Place, trained: Path, tmp_path: Path) -> None:
    """With adapters that add nothing the reference is the actor's own base; with SFT's it is a model of its own."""
    run = tmp_path / "run"
    overrides = [f"pretrained_checkpoint.restore_from_path={trained.parent / 'base'}"]
    if start == "adapters":
        overrides.append(f"model.peft.restore_from_path={trained}")
    assert ppo.run(ppo_config(place, run, *overrides)) == 0
    kl = curve(run, "train_rollouts/init_policy_kl")
    # The critic's warm-up, then a rollout of the unmoved actor, then one after its first updates.
    assert kl[0] == 0.0
    assert kl[1] == 0.0
    assert abs(kl[2]) > 1e-4
    figures = summary(run)
    assert abs(figures["ratio_step0"] - 1.0) < 1e-6
    assert figures["logprob_gap_max"] < 1e-4
    (step,) = run.glob("checkpoints/step_*")
    actor, critic = (TorchDist(step / part).keys() for part in ("model", "critic"))
    assert all("_lora." in key for key in actor if "decoder" in key)
    assert "embedding.word_embeddings.weight" in critic - actor
    assert export.run(load("export", checkpoint=run, out=tmp_path / "hf", dtype="float32")) == 0
