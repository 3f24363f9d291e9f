"""Convert, export, verify: exact, bounded in memory, gone on with after a kill, and never fooled by a wrong map."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversion_files import SERVED, SHAPE, UNTIED, load, write
from safetensors.torch import load_file, save_file
from stage_files import Place

from her_nemo.config.errors import UserError
from her_nemo.megatron import conversion, qwen3_map, streaming
from her_nemo.megatron.qwen3_map import Entry, Span
from her_nemo.stages import convert, export, verify

MODELS = {
    "tied": ("tied", "model"),
    "untied": ("untied", "model"),
    "reward": ("ppo", "model"),
    "critic": ("ppo", "critic"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, place: Place) -> dict[str, tuple[Path, str]]:
    """Name -> (checkpoint directory, part) of trained tied, untied, reward and critic models."""
    home = tmp_path_factory.mktemp("trained")
    tokenizer = place.world / "tokenizer"
    write(home / "tied", {"model": ("lm", SHAPE)}, tokenizer)
    write(home / "untied", {"model": ("lm", UNTIED)}, tokenizer)
    write(home / "ppo", {"model": ("scalar", UNTIED), "critic": ("scalar", SHAPE)}, tokenizer)
    return {name: (home / directory, part) for name, (directory, part) in MODELS.items()}


def export_of(trained: dict, name: str, out: Path, **changes: object) -> Path:
    directory, part = trained[name]
    values = {"checkpoint": directory, "out": out, "part": part, "dtype": "float32", "shard_bytes": 60_000, **changes}
    assert export.run(load("export", **values)) == 0
    return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["full", "layers"])
def test_trained_models_survive_the_way_there_and_back(
    name: str, how: str, trained: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = export_of(trained, name, tmp_path / "hf", proof=how)
    body = json.loads((out / "proof.json").read_text())
    assert body["method"] == how
    if how == "full":
        assert body["logits_max_abs_diff"] < 1e-4
        assert body["top1_agreement"] == 1.0
    else:
        assert body["largest_relative_difference"] < 1e-5
        assert {"0", "1", "2", "embedding", "head"} == body["layers"].keys()
    assert not [*out.glob("done.*"), *out.glob("identity.json")]
    shape = SHAPE if name in ("tied", "critic") else UNTIED
    wanted = qwen3_map.hf_shapes(shape, "lm" if name in ("tied", "untied") else "scalar")
    assert {key: tuple(facts["shape"]) for key, facts in body["tensors"].items()} == wanted
    # Back into Megatron, and out again: the same bits.
    assert convert.run(load("convert", source=out, out=tmp_path / "back")) == 0
    directory, part = trained[name]
    assert verify.run(load("verify", a=tmp_path / "back", b=out)) == 0
    if part == "model":
        assert verify.run(load("verify", a=directory, b=tmp_path / "back")) == 0
    assert verify.run(load("verify", a=out, b=directory, part=part)) == 0
    assert capsys.readouterr().out.count("equal bit for bit") == (3 if part == "model" else 2)


def swapped_gate_and_up(entry: Entry, shape: object, rows: int) -> list[Span] | None:
    if entry.kind != "gate_up":
        return None
    gate, up = right(entry, shape, rows)
    return [Span(up.name, 0, 0, up.count), Span(gate.name, 0, up.count, gate.count)]


def swapped_heads(entry: Entry, shape: object, rows: int) -> list[Span] | None:
    """The two query heads of the second group, exchanged."""
    if entry.kind != "qkv":
        return None
    width = SHAPE.kv_channels
    found = []
    for span in right(entry, shape, rows):
        if span.name == entry.names[0] and span.start == 2 * width:
            found += [Span(span.name, 3 * width, span.row, width), Span(span.name, 2 * width, span.row + width, width)]
        else:
            found.append(span)
    return found


def ungrouped_heads(entry: Entry, shape: object, rows: int) -> list[Span] | None:
    """All queries, then all keys, then all values: the layout of models without groups."""
    if entry.kind != "qkv":
        return None
    found, row = [], 0
    for name in entry.names:
        count = sum(span.count for span in right(entry, shape, rows) if span.name == name)
        found.append(Span(name, 0, row, count))
        row += count
    return found


right = qwen3_map.spans
WRONG_SPANS: dict[str, Callable[..., list[Span] | None]] = {
    "swapped gate and up": swapped_gate_and_up,
    "swapped heads": swapped_heads,
    "ungrouped heads": ungrouped_heads,
}


def with_wrong_spans(monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., list[Span] | None]) -> None:
    """The table of rows is wrong wherever it is used: live model and files, there and back."""
    from her_nemo.megatron import weights

    def spans(entry: Entry, shape: object, rows: int) -> list[Span]:
        return wrong(entry, shape, rows) or right(entry, shape, rows)

    for module in (qwen3_map, conversion, streaming, weights):
        monkeypatch.setattr(module, "spans", spans)


def refused(trained: dict, name: str, out: Path, **changes: object) -> str:
    with pytest.raises(UserError, match="not exported") as caught:
        export_of(trained, name, out, **changes)
    assert not out.exists()
    assert not (Path(f"{out}.partial") / "config.json").exists()
    return str(caught.value)


@pytest.mark.parametrize("how", ["full", "layers"])
@pytest.mark.parametrize("wrong", WRONG_SPANS)
@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_table_of_rows_is_caught(
    name: str, wrong: str, how: str, trained: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything of ours agrees with itself here: only the function of the model tells."""
    with_wrong_spans(monkeypatch, WRONG_SPANS[wrong])
    said = refused(trained, name, tmp_path / "hf", proof=how)
    assert "differ" in said
    assert "tensors differ" not in said


@pytest.mark.parametrize("how", ["full", "layers"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_off_by_one_are_caught(
    name: str, how: str, trained: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer gets the weights of the one before it, in the files and in the live model's export alike."""
    original = qwen3_map.layer_entry

    def shifted(parameter: str, layer: int) -> Entry | None:
        return original(parameter, (layer + 1) % SHAPE.num_layers)

    from her_nemo.megatron import weights

    for module in (qwen3_map, weights):
        monkeypatch.setattr(module, "layer_entry", shifted)
    refused(trained, name, tmp_path / "hf", proof=how)


@pytest.mark.parametrize("how", ["full", "layers"])
def test_a_stale_head_is_caught(how: str, trained: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untied model whose lm_head is written from the embedding, as if it were tied."""
    original = streaming.MegatronTensors.rows

    def rows(self: streaming.MegatronTensors, name: str, *place: object) -> torch.Tensor:
        return original(self, qwen3_map.EMBEDDING if name == qwen3_map.LM_HEAD else name, *place)

    monkeypatch.setattr(streaming.MegatronTensors, "rows", rows)
    said = refused(trained, "untied", tmp_path / "hf", proof=how)
    assert "lm_head" in said or "head: outputs differ" in said


@pytest.mark.parametrize("how", ["full", "layers"])
def test_a_head_of_an_earlier_step_is_caught(
    how: str, trained: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The score of a reward model that was trained on since it was gathered."""
    original = streaming.MegatronTensors.rows

    def rows(self: streaming.MegatronTensors, name: str, *place: object) -> torch.Tensor:
        found = original(self, name, *place)
        return found * 1.01 if name == qwen3_map.SCORE else found

    monkeypatch.setattr(streaming.MegatronTensors, "rows", rows)
    refused(trained, "reward", tmp_path / "hf", proof=how)


@pytest.mark.parametrize("how", ["full", "layers"])
@pytest.mark.parametrize("harm", ["a bit", "exchanged", "transposed", "lost", "too many"])
def test_harm_done_to_the_files_is_caught(
    harm: str, how: str, trained: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = export.write

    def harmful(cfg: object, source: object, partial: Path) -> dict[str, str]:
        held = original(cfg, source, partial)
        file = partial / "model.safetensors"
        tensors = load_file(file)
        a, b = (f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1))
        if harm == "a bit":
            tensors[a].view(torch.int32)[3, 5] ^= 1
        elif harm == "exchanged":
            tensors[a], tensors[b] = tensors[b], tensors[a]
        elif harm == "transposed":
            tensors[a] = tensors[a].T.contiguous()
        elif harm == "lost":
            tensors.pop(a)
        else:
            tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        save_file(tensors, file)
        return held

    monkeypatch.setattr(export, "write", harmful)
    said = refused(trained, "tied", tmp_path / "hf", proof=how, shard_bytes=10**9)
    named = "q_proj.bias" if harm == "too many" else "model.layers.0.self_attn.o_proj.weight"
    assert named in said


def test_half_precision_is_rounded_once_and_proved_as_tightly(trained: dict, tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16"):
        out = export_of(trained, "untied", tmp_path / dtype, dtype=dtype)
        assert json.loads((out / "proof.json").read_text())["logits_max_abs_diff"] < 1e-4
        assert verify.run(load("verify", a=trained["untied"][0], b=out)) == 0
    convert.run(load("convert", source=tmp_path / "bfloat16", out=tmp_path / "m16", trainer__precision="bf16-mixed"))
    convert.run(load("convert", source=tmp_path / "bfloat16", out=tmp_path / "m32", trainer__precision="32"))
    assert verify.run(load("verify", a=tmp_path / "m16", b=tmp_path / "m32")) == 0
    with pytest.raises(UserError, match="65504"):
        streaming.cast(torch.tensor([7e4]), torch.float16, "x")


def test_verify_says_what_differs_first_and_where(
    trained: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = export_of(trained, "tied", tmp_path / "hf", shard_bytes=10**9)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] += 0.5
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, out / "model.safetensors")
    capsys.readouterr()
    assert verify.run(load("verify", a=trained["tied"][0], b=out)) == 1
    said = capsys.readouterr().out
    assert "first tensor that differs: model.layers.1.mlp.up_proj.weight: at [7, 3]:" in said
    assert "1 of 3840 numbers differ, by 0.5 at most" in said
    assert "model.layers.2.mlp.down_proj.weight: at [0, 0]:" in said
    assert verify.run(load("verify", a=trained["tied"][0], b=trained["untied"][0])) == 1
    said = capsys.readouterr().out
    assert "config: tied: True and False" in said
    assert "lm_head.weight: only in the second" in said


def scores(model: Path, prompts: list[list[int]]) -> list[float]:
    """transformers' own scores of each sequence alone, by its own pooling."""
    from transformers import AutoModelForSequenceClassification

    network = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return [float(network(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in prompts]


def megatron_scores(checkpoint: Path, part: str, prompts: list[list[int]]) -> list[float]:
    from her_nemo.megatron import forward, parallel
    from her_nemo.training import source as sources

    parallel.initialize(seed=0)
    try:
        source = sources.locate(checkpoint, part)
        layout = load("export", checkpoint="x", out="y").model
        model = sources.build(source, layout, "32", head="scalar", trainable=False)
        found = [forward.values(model, [{"tokens_BS": torch.tensor([ids])}])[0][0, -1] for ids in prompts]
        return [float(score) for score in found]
    finally:
        parallel.destroy()


PROMPTS = [torch.randint(5, 1000, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 9, 20)]
VLLM = """
import json, sys
from vllm import LLM
from vllm.pooling_params import PoolingParams
from vllm.inputs import TokensPrompt

model, prompts = sys.argv[1], json.loads(sys.argv[2])
engine = LLM(model=model, runner="pooling", dtype="float32", enforce_eager=True, max_model_len=64)
outputs = engine.classify(
    [TokensPrompt(prompt_token_ids=ids) for ids in prompts],
    pooling_params=PoolingParams(use_activation=False), use_tqdm=False,
)
print("SCORES", json.dumps([output.outputs.probs[0] for output in outputs]))
"""


@pytest.mark.parametrize("name", ["reward", "critic"])
def test_transformers_scores_as_megatron_does(name: str, trained: dict, tmp_path: Path) -> None:
    out = export_of(trained, name, tmp_path / "hf")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3ForSequenceClassification"]
    found, wanted = scores(out, PROMPTS), megatron_scores(*trained[name], PROMPTS)
    assert found == pytest.approx(wanted, abs=1e-4)
    assert max(wanted) - min(wanted) > 1e-3, "the model says the same of everything"


@pytest.mark.vllm
@pytest.mark.parametrize("part", ["model", "critic"])
def test_vllm_pooling_scores_as_megatron_does(part: str, place: Place, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    models = {"model": ("scalar", replace(SERVED, tied=False)), "critic": ("scalar", SERVED)}
    served = {"it": (write(tmp_path / "ppo", models, place.world / "tokenizer"), part)}
    out = export_of(served, "it", tmp_path / "hf")
    done = subprocess.run(
        [sys.executable, "-c", VLLM, str(out), json.dumps(PROMPTS)], capture_output=True, text=True, timeout=300,
        check=False, cwd=tmp_path,
        env={
            **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = next(line for line in done.stdout.splitlines() if line.startswith("SCORES "))
    wanted = megatron_scores(*served["it"], PROMPTS)
    assert json.loads(said.removeprefix("SCORES ")) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parallel
def test_two_processes_convert_export_and_verify(trained: dict, tmp_path: Path, stage: Callable[..., None]) -> None:
    """Through the command line: the files are shared out, and the full proof gathers a model that is cut in two."""
    for layout in ("tensor", "pipeline"):
        if layout == "pipeline":
            # Three layers cannot be dealt out to two: the clear error, before anything is written.
            with pytest.raises(AssertionError, match="does not divide"):
                stage("export", f"checkpoint={trained['tied'][0]}", f"out={tmp_path / 'no'}", "trainer.devices=2",
                      "model.pipeline_model_parallel_size=2")  # fmt: skip
            assert not (tmp_path / "no.partial").exists()
            continue
        stage("export", f"checkpoint={trained['tied'][0]}", f"out={tmp_path / 'hf'}", "trainer.devices=2",
              "model.tensor_model_parallel_size=2", "dtype=float32", "shard_bytes=60000", "proof=full")  # fmt: skip
    stage("convert", f"source={tmp_path / 'hf'}", f"out={tmp_path / 'back'}", "trainer.devices=2", "shard_bytes=60000")
    assert len(list((tmp_path / "back" / "model").glob("*.distcp"))) > 2
    stage("verify", str(trained["tied"][0]), str(tmp_path / "back"))


def test_what_is_not_ours_is_not_replaced(trained: dict, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        export_of(trained, "tied", tmp_path / "thesis")
    with pytest.raises(UserError, match="holds other files"):
        convert.run(load("convert", source=export_of(trained, "tied", tmp_path / "hf"), out=tmp_path / "thesis"))
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"
    # An older export of ours is.
    export_of(trained, "untied", tmp_path / "hf")
    assert verify.run(load("verify", a=trained["untied"][0], b=tmp_path / "hf")) == 0


def test_the_tokenizer_is_copied_without_the_weights_beside_it(trained: dict, tmp_path: Path) -> None:
    hf = export_of(trained, "tied", tmp_path / "hf")
    convert.run(load("convert", source=hf, out=tmp_path / "m"))
    kept = {file.name for file in (tmp_path / "m" / "tokenizer").iterdir()}
    assert "tokenizer.json" in kept
    assert not any(name.endswith((".safetensors", ".index.json")) for name in kept)
