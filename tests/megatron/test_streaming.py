"""Streamed conversion: every fault of the files named before anything is written, exact at any layout, gone on with."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY

from her_nemo.config.errors import UserError
from her_nemo.megatron import conversion, qwen3, state, streaming, torch_dist, weights
from her_nemo.megatron.conversion import to_safetensors, to_torch_dist
from her_nemo.megatron.qwen3 import Qwen3Shape
from her_nemo.megatron.safetensors_files import HfTensors, TensorFile
from her_nemo.megatron.streaming import MegatronTensors, ahead

UNTIED = replace(TINY, tied=False)
SMALL = {"block_bytes": 3000, "file_bytes": 40_000}


def hf_model(directory: Path, shape: Qwen3Shape = UNTIED, head: str = "lm", shard_bytes: int = 50_000) -> Path:
    """Hugging Face files with random tensors of normal size, in several shards."""
    torch.manual_seed(11)
    model = qwen3.build(shape, head=head, trainable=False)
    for parameter in model.bare().parameters():
        parameter.data.normal_()
    weights.save_hf(model, directory, shard_bytes=shard_bytes)
    return directory


def convert(source: Path, out: Path, shape: Qwen3Shape = UNTIED, head: str = "lm", **changes: object) -> dict:
    held = HfTensors(source)
    weights.check_hf(held, shape, head)
    values = {"precision": "32", "dtype": torch.float32, **SMALL, **changes}
    try:
        return to_torch_dist(held, out, shape, head, **values)
    finally:
        held.close()


def tensors_of(model: qwen3.Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in weights.hf_tensors(model)}


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(directory.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize(("shape", "head"), [(TINY, "lm"), (UNTIED, "lm"), (TINY, "scalar")])
@pytest.mark.parametrize("tensor", [1, 2])
def test_megatron_core_loads_what_is_streamed_and_the_reverse(
    shape: Qwen3Shape, head: str, tensor: int, tmp_path: Path
) -> None:
    source = hf_model(tmp_path / "hf", shape, head)
    files = convert(source, tmp_path / "m", shape, head, tensor=tensor)
    assert len(files) > 3
    model = qwen3.build(shape, head=head, trainable=False)
    state.load(tmp_path / "m", model)
    assert_same(tensors_of(model), all_tensors(source))
    # What megatron-core itself writes has the same names and shapes, and is read here a few rows at a time.
    state.save(tmp_path / "own", model)
    streamed, own = (torch_dist.read_index(tmp_path / name / ".metadata") for name in ("m", "own"))
    padded = {"embedding.word_embeddings.weight"} | ({"output_layer.weight"} if head == "lm" else set())
    for key, held in own.state_dict_metadata.items():
        mine = streamed.state_dict_metadata[key]
        assert mine.properties.dtype == held.properties.dtype
        assert mine.size == held.size or (key in padded and held.size[0] == 128)
    assert streamed.state_dict_metadata.keys() == own.state_dict_metadata.keys()
    for place in ("m", "own"):
        held = MegatronTensors(tmp_path / place, shape, head)
        assert_same({name: held.whole(name) for name in held.names()}, all_tensors(source))
        name = "model.layers.1.self_attn.k_proj.weight"
        assert torch.equal(held.rows(name, 13, 29), all_tensors(source)[name][13:29])
        held.close()


def spoilt(directory: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = "") -> None:
    path = directory / (file or sorted(entry.name for entry in directory.glob("*.safetensors"))[0])
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_everything_wrong_is_named_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf")
    files = sorted(entry.name for entry in source.glob("*.safetensors"))
    index = json.loads((source / "model.safetensors.index.json").read_text())
    spoilt(source, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(101, 48)}))
    spoilt(source, lambda tensors: tensors.update({"odd.weight": torch.zeros(2, dtype=torch.int8)}))
    index["weight_map"] |= {"odd.weight": files[0], "model.norm.weight": files[0]}
    layer = next(name for name, file in index["weight_map"].items() if file == files[1] and "layernorm" in name)
    spoilt(source, lambda tensors: tensors.update({layer: torch.zeros(7)}), files[1])
    cut = source / files[2]
    cut.write_bytes(cut.read_bytes()[:-5])
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        convert(source, tmp_path / "m")
    said = str(caught.value)
    assert f"duplicate: lm_head.weight in {files[0]} and in {files[-1]}" in said
    assert "unexpected: odd.weight" in said
    assert f"{layer} has shape (7,), the model wants (48,)" in said
    assert f"{files[2]}: not a whole safetensors file" in said
    assert f"model.safetensors.index.json puts model.norm.weight into {files[0]}, which does not hold it" in said
    assert said.count("missing: ") >= 2
    assert not (tmp_path / "m").exists()


def test_other_faults_of_a_source(tmp_path: Path) -> None:
    tied = hf_model(tmp_path / "tied", TINY, shard_bytes=10**9)
    spoilt(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    convert(tied, tmp_path / "m1", TINY)
    spoilt(tied, lambda tensors: tensors["lm_head.weight"].add_(1e-3))
    with pytest.raises(UserError, match="one of the two is stale"):
        convert(tied, tmp_path / "m2", TINY)
    model = hf_model(tmp_path / "hf", shard_bytes=10**9)
    spoilt(model, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.float64)}))
    with pytest.raises(UserError, match=r"model\.norm\.weight is float64"):
        convert(model, tmp_path / "m3")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \.safetensors"):
        convert(model, tmp_path / "m3")
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}).encode()
    (tmp_path / "gap.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    with pytest.raises(UserError, match="starts at byte 8"):
        TensorFile(tmp_path / "gap.safetensors")
    (tmp_path / "long.safetensors").write_bytes((10**12).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="its header claims"):
        TensorFile(tmp_path / "long.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_is_read_and_cast_once(dtype: torch.dtype, tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf", shard_bytes=10**9)
    spoilt(source, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    convert(source, tmp_path / "m", precision="bf16-mixed", dtype=torch.bfloat16)
    model = qwen3.build(UNTIED, dtype="32", trainable=False)
    state.load(tmp_path / "m", model)
    wanted = {name: tensor.to(torch.bfloat16).float() for name, tensor in all_tensors(source).items()}
    assert_same(tensors_of(model), wanted)


def killed_after(
    count: int, work: Callable[[Callable[[int], object]], object], ready: Callable[[], object] = lambda: True
) -> None:
    """Run `work` in a process that dies by SIGKILL when it has been heard of `count` times and `ready` says so (the
    threads that write may lag behind the one that is heard of)."""
    child = os.fork()
    if child == 0:
        heard = 0

        def watch(_: int) -> None:
            nonlocal heard
            heard += 1
            if heard > count:
                deadline = time.monotonic() + 20
                while not ready() and time.monotonic() < deadline:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            work(watch)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it came to its end before it could be killed"


@pytest.mark.parametrize("count", [1, 30, 60])
def test_a_killed_convert_leaves_no_checkpoint_and_is_gone_on_with(count: int, tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf")
    wanted = convert(source, tmp_path / "whole")
    out = tmp_path / "cut"
    killed_after(count, lambda watch: convert(source, out, watch=watch))
    assert not state.is_checkpoint(out)
    assert not (out / ".metadata").exists()
    times = {name: (out / name).stat().st_mtime_ns for name in finished(out)}
    assert times or count < 60
    if times:
        # A finished file that was damaged since is made again; the others are not.
        victim = sorted(times)[0]
        times.pop(victim)
        content = bytearray((out / victim).read_bytes())
        content[len(content) // 2] ^= 1
        (out / victim).write_bytes(content)
    assert convert(source, out) == wanted
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    model = qwen3.build(UNTIED, trainable=False)
    state.load(out, model)
    assert_same(tensors_of(model), all_tensors(source))
    assert not finished(out)


def finished(directory: Path) -> list[str]:
    lines = [line for file in directory.glob("done.*.jsonl") for line in file.read_text().splitlines() if line]
    return [json.loads(line)["file"] for line in lines]


def test_another_source_starts_over(tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf")
    out = tmp_path / "cut"
    killed_after(60, lambda watch: convert(source, out, watch=watch))
    assert finished(out)
    spoilt(source, lambda tensors: tensors["model.embed_tokens.weight"].add_(1))
    convert(source, out)
    model = qwen3.build(UNTIED, trainable=False)
    state.load(out, model)
    assert_same(tensors_of(model), all_tensors(source))


def test_a_killed_export_is_gone_on_with(tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf")
    convert(source, tmp_path / "m")

    def export(watch: Callable[[int], object] = lambda _: None) -> dict[str, str]:
        held = MegatronTensors(tmp_path / "m", UNTIED, "lm")
        return to_safetensors(
            held, tmp_path / "out", UNTIED, "lm", torch.float32, shard_bytes=50_000, identity={"of": "m"},
            block_bytes=3000, watch=watch,
        )  # fmt: skip

    killed_after(40, export, lambda: finished(tmp_path / "out"))
    done = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished(tmp_path / "out")}
    assert done
    digests = export()
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done} == done
    assert_same(all_tensors(tmp_path / "out"), all_tensors(source))
    written = HfTensors(tmp_path / "out")
    assert digests == streaming.tensor_digests(written, dict.fromkeys(written.names(), torch.float32))


def test_processes_share_the_files_out(tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf")
    wanted = convert(source, tmp_path / "whole")
    files = conversion.data_files(conversion.blocks(UNTIED, "lm", torch.float32, 1, 3000), 4, 40_000)
    assert {name for name, _ in files} == wanted.keys()
    shares = [conversion.Share(rank, 3).mine(files) for rank in range(3)]
    assert sorted(name for share in shares for name, _ in share) == sorted(wanted)
    assert all(shares)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    convert(hf_model(tmp_path / "hf"), tmp_path / "m", file_bytes=10**9)
    with pytest.raises(UserError, match=r"missing: output_layer|ffn|has shape"):
        MegatronTensors(tmp_path / "m", replace(UNTIED, ffn_hidden_size=96), "lm")
    with pytest.raises(UserError, match="unexpected: output_layer"):
        MegatronTensors(tmp_path / "m", TINY, "lm")
    file = tmp_path / "m" / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:200] + bytes(400) + content[600:])
    held = MegatronTensors(tmp_path / "m", UNTIED, "lm")
    with pytest.raises(UserError, match="cannot be read"):
        held.whole("model.embed_tokens.weight")
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cannot be read|ends"):
        held.whole("lm_head.weight")


def test_errors_of_the_reading_thread_arrive() -> None:
    def items():
        yield 1
        raise UserError("broken")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(UserError, match="broken"):
        next(found)
    # A reader that is not read to its end stops.
    endless = ahead(iter(int, 1), depth=1)
    assert next(endless) == 0
    endless.close()
