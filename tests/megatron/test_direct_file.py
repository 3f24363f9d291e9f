"""Files written past the page cache hold what was written, in any order and on file systems that cannot."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from pathlib import Path

import pytest
import torch

from her_nemo.megatron import direct_file
from her_nemo.megatron.direct_file import DirectFile, Slabs

SIZES = (3, 4096, 1, 20_000, 4095, 8192, 77)


@pytest.fixture(params=["direct", "refused at opening", "refused at writing"])
def small_stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(direct_file, "STAGED_BYTES", 8192)
    original_open, original_write = os.open, os.pwrite

    def refusing_open(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return original_open(path, flags, mode)

    def refusing_write(descriptor: int, view: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return original_write(descriptor, view, offset)

    if request.param == "refused at opening":
        monkeypatch.setattr(direct_file.os, "open", refusing_open)
    elif request.param == "refused at writing":
        monkeypatch.setattr(direct_file.os, "pwrite", refusing_write)
    return request.param


def test_what_is_written_in_order_lies_there(small_stage: str, tmp_path: Path) -> None:
    pieces = [random.Random(size).randbytes(size) for size in SIZES]
    file = DirectFile(tmp_path / "file")
    for piece in pieces:
        file.write(piece)
        assert file.size == file.position
    file.finish()
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert file.size == sum(SIZES)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_written_in_any_order_lies_there(seed: int, small_stage: str, tmp_path: Path) -> None:
    order = random.Random(seed)
    pieces = [order.randbytes(size) for size in SIZES]
    offsets = [sum(SIZES[:index]) for index in range(len(SIZES))]
    places = list(range(len(SIZES)))
    order.shuffle(places)
    file = DirectFile(tmp_path / "file")
    for place in places:
        file.write_at(offsets[place], pieces[place])
    file.finish()
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_a_full_disk_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, view: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    file = DirectFile(tmp_path / "file")
    file.write(b"x")
    monkeypatch.setattr(direct_file.os, "pwrite", full)
    with pytest.raises(OSError, match="no space"):
        file.finish()


def test_slabs_are_used_again_and_no_larger_than_asked() -> None:
    slabs = Slabs(2)
    first = slabs.take((4, 3), torch.float32)
    first.fill_(1)
    second = slabs.take((5,), torch.bfloat16)
    third = slabs.take((2, 2), torch.int32)
    assert third.data_ptr() == first.data_ptr()
    assert third.untyped_storage().nbytes() == 16
    assert second.data_ptr() != first.data_ptr()
    assert slabs.take((100,), torch.float32).shape == (100,)
