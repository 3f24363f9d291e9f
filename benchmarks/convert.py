#!/usr/bin/env python
"""Seconds and peak memory of `cp`, our import, our export, and transformers' load + save, on one random Qwen3.

    python benchmarks/convert.py [--gigabytes 8] [--rounds 2] [--dir DIR] [--json FILE] [--skip-transformers] [--cold]
    python benchmarks/convert.py --like-32b       # two layers with the tensors of Qwen3-32B, for TP 8 and PP 2

Every line is a process of its own, so that its peak memory (ru_maxrss) is its own, and its start-up counts. Every
writer ends with its bytes on the disk: `cp` is followed by fsync of each file, as ours do. A round is `cp`, import,
export, one after another; what is compared is the best of the rounds. `--cold` drops the source from the page cache
before each line, so that reading is from the disk too. The export's proof is a line of its own: it reads everything
again. "start-up" is what import takes before it reads a byte.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARDS = 4
AIM_RATIO, AIM_BYTES = 1.25, 2 * 2**30
VOCABULARY = 151_936
LIKE_32B = {
    "num_layers": 2, "hidden_size": 5120, "ffn_hidden_size": 25_600, "num_attention_heads": 64, "num_query_groups": 8,
    "kv_channels": 128, "vocab_size": VOCABULARY, "tied": False,
}  # fmt: skip
LAYOUT_32B = ["model.tensor_model_parallel_size=8", "model.pipeline_model_parallel_size=2"]


def shape_of(gigabytes: float) -> dict[str, int]:
    """Sizes of a Qwen3-like model in bf16 of about this many gigabytes (0: like 32B): width, then layers to fill."""
    if not gigabytes:
        return LIKE_32B
    numbers = gigabytes * 1e9 / 2
    widths = ((0.4e9, 512), (1.2e9, 1024), (3e9, 2048), (6e9, 2560), (10e9, 4096))
    width = next((wide for limit, wide in widths if numbers < limit), 5120)
    vocabulary = VOCABULARY if numbers > 0.4e9 else 4099
    heads, groups, head = width // 64, 8, 128
    ffn = 3 * width
    layer = width * head * (2 * heads + 2 * groups) + 3 * width * ffn
    layers = max(1, round((numbers - vocabulary * width) / layer))
    return {
        "num_layers": layers, "hidden_size": width, "ffn_hidden_size": ffn, "num_attention_heads": heads,
        "num_query_groups": groups, "kv_channels": head, "vocab_size": vocabulary,
    }  # fmt: skip


# ---------------------------------------------------------------- what each process does


def make(directory: Path, gigabytes: float) -> None:
    """Random bf16 weights, in several shards. Numbers recur after 34 MB, shifted, so that drawing takes no minutes."""
    import torch

    sys.path.insert(0, str(ROOT))
    from her_nemo.megatron import safetensors_files as files
    from her_nemo.megatron.qwen3 import Qwen3Shape
    from her_nemo.megatron.qwen3_map import hf_shapes

    shape = Qwen3Shape(**shape_of(gigabytes))
    shapes = hf_shapes(shape, "lm")
    total = sum(2 * torch.Size(size).numel() for size in shapes.values())
    directory.mkdir(parents=True)
    groups = files.shards(shapes, 2, -(-total // SHARDS) + 1)
    drawn = (torch.randn(2**24) * 0.02).to(torch.bfloat16).repeat(2)
    written = 0
    for name, tensors in groups:
        writer = files.TensorFileWriter(directory / name, tensors, torch.bfloat16)
        for tensor, size in tensors.items():
            width = size[1] if len(size) > 1 else 1
            step = 2**24 // width
            for start in range(0, size[0], step):
                rows = min(step, size[0] - start)
                shift = 7919 * written % 2**24
                writer.write(tensor, start, drawn[shift : shift + rows * width].view(rows, *size[1:]))
                written += 1
        writer.finish()
    if len(groups) > 1:
        (directory / files.INDEX_FILE).write_text(json.dumps(files.index_of(groups, 2)))
    (directory / "config.json").write_text(json.dumps(shape.to_hf_config(dtype=torch.bfloat16)))


def copy(source: Path, out: Path) -> None:
    """`cp` of the weights, then fsync of each copy."""
    out.mkdir()
    files = sorted(source.glob("*.safetensors"))
    subprocess.run(["cp", *map(str, files), str(out)], check=True)
    sync(out)


def sync(folder: Path) -> None:
    """fsync of each file."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def import_(source: Path, out: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from her_nemo import cli

    words = [f"source={source}", f"out={out}", "trainer.precision=bf16-mixed"]
    wide = json.loads((source / "config.json").read_text())["hidden_size"] == LIKE_32B["hidden_size"]
    raise SystemExit(cli.main(["convert", *words, *(LAYOUT_32B if wide else [])]))


def start_up(source: Path, out: Path) -> None:
    """What import does before it reads a byte."""
    sys.path.insert(0, str(ROOT))
    from her_nemo.stages import convert

    raise SystemExit(0 if convert.run else 1)


def export(source: Path, out: Path) -> None:
    """The writing half of the export: what `her-nemo export` does before its proof."""
    sys.path.insert(0, str(ROOT))
    import torch

    from her_nemo.megatron import conversion, parallel
    from her_nemo.training import source as sources

    found = sources.locate(source)
    parallel.initialize()
    held = found.tensors()
    digests = conversion.to_safetensors(
        held, out, found.shape, found.head, torch.bfloat16, shard_bytes=5_000_000_000, identity=found.identity()
    )
    (out / "digests.json").write_text(json.dumps(digests))
    parallel.destroy()


def prove(source: Path, out: Path) -> None:
    """The proof by layers of what `export` wrote."""
    sys.path.insert(0, str(ROOT))
    import torch

    from her_nemo.megatron import parallel
    from her_nemo.megatron.single_layer import SingleLayer
    from her_nemo.training import proof
    from her_nemo.training import source as sources

    found = sources.locate(source)
    parallel.initialize()
    findings = proof.Findings()
    proof.tensors_agree(out, json.loads((out / "digests.json").read_text()), torch.bfloat16, findings)
    config = proof.hf_config(found.shape, found.head, torch.bfloat16, {})
    single = SingleLayer(found.path / found.part, found.shape, found.head, torch.bfloat16)
    proof.layers_agree(out, config, single, 4, 1e-4, findings)
    parallel.destroy()
    raise SystemExit("; ".join(findings.failures) or 0)


def plain(source: Path, out: Path) -> None:
    """transformers: load and save, with fsync."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, local_files_only=True)
    model.save_pretrained(out)
    sync(out)


def verify(source: Path, out: Path) -> None:
    """`her-nemo verify`: the source against the imported checkpoint, tensor by tensor."""
    sys.path.insert(0, str(ROOT))
    from her_nemo import cli

    raise SystemExit(cli.main(["verify", str(source), str(out)]))


WORKERS = {
    "cp": copy, "start-up": start_up, "import": import_, "export": export, "proof": prove, "verify": verify,
    "transformers": plain,
}  # fmt: skip


# ---------------------------------------------------------------- the comparison


def measure(name: str, source: Path, out: Path) -> dict[str, Any]:
    """Run one line in a process of its own: seconds of wall and processor time, peak memory in bytes."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, "--worker", name, str(source), str(out)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{name} failed: exit code {os.waitstatus_to_exitcode(status)}")
    processor = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "processor_seconds": processor, "peak_rss": usage.ru_maxrss * 1024}


def forget(directory: Path) -> None:
    """Ask the kernel to drop a directory's files from its page cache."""
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def lines_of(given: argparse.Namespace, base: Path) -> list[tuple[str, Path, Path]]:
    """(name, what it reads, what it writes), in the order of the runs."""
    source, megatron, again = base / "hf", base / "megatron", base / "hf_again"
    compared = [("cp", source, base / "copy"), ("import", source, megatron), ("export", megatron, again)]
    once = [("start-up", source, base / "nothing"), ("proof", megatron, again), ("verify", source, megatron)]
    if not given.skip_transformers:
        once.append(("transformers", source, base / "plain"))
    return compared * given.rounds + once


def run(given: argparse.Namespace) -> dict[str, Any]:
    base = Path(tempfile.mkdtemp(prefix="convert_", dir=given.dir))
    try:
        source = base / "hf"
        words = ["--make", str(source), "--gigabytes", str(given.gigabytes)]
        subprocess.run([sys.executable, "-W", "ignore", __file__, *words], check=True)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards, {shape_of(given.gigabytes)}; "
              f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        results: dict[str, list[dict[str, Any]]] = {}
        print(f"{'':14}{'seconds':>9}{'cpu s':>8}{'GB/s':>7}{'peak MiB':>10}{'load':>7}")
        for name, read, target in lines_of(given, base):
            if name in ("cp", "import", "export"):
                shutil.rmtree(target, ignore_errors=True)
            if given.cold:
                forget(read)
            load = os.getloadavg()[0]
            found = measure(name, read, target) | {"load": load}
            if name in ("cp", "transformers"):
                shutil.rmtree(target)
            results.setdefault(name, []).append(found)
            taken = found["seconds"]
            print(f"{name:14}{taken:9.2f}{found['processor_seconds']:8.1f}{size / 1e9 / taken:7.2f}"
                  f"{found['peak_rss'] / 2**20:10.0f}{load:7.1f}", flush=True)
        best = {name: min(found["seconds"] for found in every) for name, every in results.items()}
        peaks = {name: max(found["peak_rss"] for found in every) for name, every in results.items()}
        print("best of the rounds, of cp: " + ", ".join(f"{name} {best[name] / best['cp']:.2f}" for name in best))
        verdict = {
            name: best[name] <= AIM_RATIO * best["cp"] and peaks[name] <= AIM_BYTES for name in ("import", "export")
        }
        print(f"aim: import and export <= {AIM_RATIO} x cp and <= {AIM_BYTES >> 20} MiB: "
              + ", ".join(f"{name} {'met' if met else 'MISSED'}" for name, met in verdict.items()))
        return {"bytes": size, "shape": shape_of(given.gigabytes), "cold": given.cold, "results": results,
                "aim_met": verdict}
    finally:
        shutil.rmtree(base, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the model in bf16")
    parser.add_argument("--like-32b", action="store_true", help="two layers with the tensor sizes of Qwen3-32B, 5 GB")
    parser.add_argument("--rounds", type=int, default=2, help="how often cp, import and export run")
    parser.add_argument("--dir", help="where to work: three times the size is needed (default: the temporary one)")
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--cold", action="store_true", help="drop the source from the page cache before each line")
    parser.add_argument("--skip-transformers", action="store_true", help="leave out what needs the most memory")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.like_32b:
        given.gigabytes = 0.0
    if given.make:
        make(Path(given.make), given.gigabytes)
    elif given.worker:
        WORKERS[given.worker[0]](Path(given.worker[1]), Path(given.worker[2]))
    else:
        found = run(given)
        if given.json:
            Path(given.json).write_text(json.dumps(found, indent=1) + "\n")
            print(f"figures in {given.json}")


if __name__ == "__main__":
    main()
