#!/usr/bin/env bash
# Make .venv: Python 3.11, CPU PyTorch, and requirements/lock.txt with checked hashes. Safe to run again:
# nothing happens while the stamp in .venv matches the lock. VENV=DIR puts it elsewhere, PYTHON=... picks a Python,
# LOCK=requirements/nemo.txt installs that lock instead (make setup-nemo).
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
LOCK=${LOCK:-requirements/lock.txt}
TORCH=$(tr -d '[:space:]' <requirements/torch.txt)
# PyTorch's own index of CPU builds, asked only where the configured indexes have no CPU build.
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

stamp=$(cat "$LOCK" requirements/torch.txt tools/setup.sh pyproject.toml | sha256sum | cut -d' ' -f1)
if [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/her_nemo.stamp" 2>/dev/null)" = "$stamp $PWD" ]; then
  exit 0
fi

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || die "the lock is for Linux on x86_64; this is $(uname -s) on $(uname -m)"

python=${PYTHON:-}
for candidate in python3.11 python3 python; do
  [ -n "$python" ] && break
  if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then python=$candidate; fi
done
[ -n "$python" ] || die "Python 3.11 is missing. On Debian 12: apt-get install python3 python3-venv, or set PYTHON=/path/to/python3.11"
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || die "$python is not Python 3.11"
"$python" -c 'import venv, ensurepip' 2>/dev/null || die "$python has no venv module. On Debian 12: apt-get install python3-venv"

started=$SECONDS
if [ -x "$VENV/bin/python" ] && ! "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
  say "$VENV is not a working Python 3.11 environment: making it anew"
  rm -rf "$VENV"
fi
[ -x "$VENV/bin/python" ] || { say "making $VENV"; "$python" -m venv "$VENV"; }
rm -f "$VENV/her_nemo.stamp"

# A terminal sees pip's bars; a log sees our lines and pip's errors.
quiet=(--disable-pip-version-check --no-input)
[ -t 1 ] || quiet+=(-qq --progress-bar off)
pip() { "$VENV/bin/python" -m pip "$@"; }

say "1/4 $TORCH (about 200 MB)"
pip install "${quiet[@]}" --no-deps "$TORCH" \
  || { say "not in the configured indexes: asking $TORCH_CPU_INDEX"; pip install "${quiet[@]}" --no-deps --extra-index-url "$TORCH_CPU_INDEX" "$TORCH"; } \
  || die "could not install $TORCH: see pip's message above"

# setuptools first: one package comes as source and is built with this one, not with one fetched unchecked.
say "2/4 build tools"
grep -A1 '^setuptools==' "$LOCK" >"$VENV/first.txt"
pip install "${quiet[@]}" --no-deps --require-hashes -r "$VENV/first.txt" || die "could not install setuptools"
say "3/4 $(grep -c '==' "$LOCK") packages, hashes checked (some hundred MB, some minutes)"
pip install "${quiet[@]}" --no-deps --require-hashes --use-pep517 --no-build-isolation -r "$LOCK" \
  || die "could not install $LOCK: see pip's message above; run it again to go on"
say "4/4 her_nemo itself"
pip install "${quiet[@]}" --no-deps --no-build-isolation -e . || die "could not install her_nemo"

cuda=$("$VENV/bin/python" - <<'CHECK'
import importlib.metadata as metadata
import torch

names = {distribution.metadata["Name"].lower() for distribution in metadata.distributions()}
found = sorted(name for name in names if name.startswith(("nvidia-", "cuda-")) or name in ("torchvision", "torchaudio", "torchcodec"))
print(*([f"torch with CUDA {torch.version.cuda}"] if torch.version.cuda else []) + found)
CHECK
)
[ -z "$cuda" ] || die "CUDA builds got into $VENV: $cuda. Remove $VENV and run this again; set no CUDA index in pip's configuration"
printf '%s\n' "$stamp $PWD" >"$VENV/her_nemo.stamp"
say "done in $((SECONDS - started)) s"
