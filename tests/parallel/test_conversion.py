"""Converting in two processes: the bytes that one process writes, each file by one of them, and none that lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run

CHECKS = str(Path(__file__).with_name("conversion_checks.py"))


def contents(directory: Path) -> dict[str, bytes]:
    """The weights' files by name."""
    kinds = ("*/*.distcp", "*/*.safetensors")
    return {file.name: file.read_bytes() for kind in kinds for file in directory.glob(kind)}


@pytest.mark.parallel
def test_two_processes_write_what_one_does_and_go_on_after_a_death(reference: Path, tmp_path: Path) -> None:
    args = {"source": str(reference / "untied")}
    (alone,) = run(1, f"{CHECKS}:there_and_back", args | {"out": str(tmp_path / "one")})
    wanted = contents(tmp_path / "one")
    assert set(alone["written"]) == wanted.keys()
    assert len(wanted) > 8
    out = tmp_path / "two"
    with pytest.raises(AssertionError, match="exited with -9"):
        run(2, f"{CHECKS}:there_and_back", args | {"out": str(out), "dies": 1})
    assert not (out / "megatron" / ".metadata").exists()
    assert not (out / "hf").exists()
    first, second = run(2, f"{CHECKS}:there_and_back", args | {"out": str(out)})
    assert not set(first["written"]) & set(second["written"])
    assert contents(out) == wanted
    assert first["files"] == alone["files"]
    assert first["tensors"] == second["tensors"] == alone["tensors"]
    assert not [*(out / "megatron").glob("done.*"), *(out / "megatron").glob("identity.json")]
