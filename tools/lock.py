"""Write requirements/lock.txt: every package of the environment, pinned, with the hash of its file.

    python tools/lock.py            run it with the pip and the Python (3.11, Linux x86_64) the environment is for
    python tools/lock.py nemo       requirements/nemo.txt, the environment with NeMo-Aligner, from nemo.in

Versions already in the lock are kept where they still fit; `--upgrade` takes the newest. pip does the resolving.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"
# name -> (what it is made of, its lock)
ENVIRONMENTS = {"main": ("environment.in", "lock.txt"), "nemo": ("nemo.in", "nemo.txt")}
# torch comes first and by itself (CPU build). torchvision to torchcodec are CUDA builds that break transformers' import
# here; NeMo names CUDA's Python bindings, and runs on the CPU without them.
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec", "cuda-bindings", "cuda-pathfinder"})
# Published as source only (pure Python).
SOURCE_ONLY = ("antlr4-python3-runtime",)
HEADER = """\
# Written by tools/lock.py from {source}; do not edit. Python 3.11, Linux x86_64.
# Installed with --no-deps --require-hashes after torch (torch.txt).
"""


def main() -> int:
    """Resolve and write the lock; exit code 1 when a CUDA package has got in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environment", nargs="?", choices=list(ENVIRONMENTS), default="main")
    parser.add_argument("--upgrade", action="store_true", help="do not keep the versions of the present lock")
    parser.add_argument("--constraint", help="a pip constraints file to hold versions at")
    arguments = parser.parse_args()
    source, target = ENVIRONMENTS[arguments.environment]
    lock = REQUIREMENTS / target
    keep = lock if lock.is_file() and not arguments.upgrade else None
    entries = resolve(source, keep=keep, constraint=arguments.constraint)
    cuda = [name for name, _, _ in entries if name.startswith("nvidia-")]
    if cuda:
        print(
            f"CUDA packages got into the lock: {', '.join(cuda)}; name their parent in LEFT_OUT",
            file=sys.stderr,
        )
        return 1
    lines = [f"{name}=={version} \\\n    --hash=sha256:{digest}" for name, version, digest in entries]
    lock.write_text(HEADER.format(source=source) + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{lock}: {len(entries)} packages")
    return 0


def resolve(source: str, *, keep: Path | None, constraint: str | None) -> list[tuple[str, str, str]]:
    """(name, version, sha256) of all packages of `source` but LEFT_OUT, by name; versions of the lock `keep` held."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--only-binary=:all:", f"--no-binary={','.join(SOURCE_ONLY)}", "--report", str(report)]
        command += ["-r", str(REQUIREMENTS / "torch.txt"), "-r", str(REQUIREMENTS / source)]
        if keep is not None:
            held = Path(folder) / "held.txt"
            held.write_text(_versions_only(keep.read_text(encoding="utf-8")), encoding="utf-8")
            command += ["-c", str(held)]
        if constraint:
            command += ["-c", constraint]
        subprocess.run(command, check=True)
        installs: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["install"]
    entries = []
    for item in installs:
        name = item["metadata"]["name"].lower().replace("_", "-")
        if name not in LEFT_OUT:
            digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
            entries.append((name, item["metadata"]["version"], digest))
    return sorted(entries)


def _versions_only(lock: str) -> str:
    return "\n".join(line.removesuffix(" \\") for line in lock.splitlines() if "==" in line)


if __name__ == "__main__":
    sys.exit(main())
