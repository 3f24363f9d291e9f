"""Tokens on disk: a data file is encoded once, by several processes, and read back memory-mapped.

An entry is named by what it is made of: the bytes of the data file, the tokenizer, the chat template, the longest
length, and the code that encodes. Rows are encoded in spans; a finished span is a file, so that a run killed at any
moment goes on where it was. The order of samples is the order of the file, whoever encoded it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from her_nemo.config.errors import UserError
from her_nemo.data.sources import RowKind, Span, conclude, read_span, spans
from her_nemo.data.text_encoder import TextEncoder
from her_nemo.data.token_store import META, TokenStore, merge_parts, write_part
from her_nemo.data.tokenise import (
    CHAT_TEMPLATE,
    Encoded,
    Encoder,
    Tokeniser,
    encode_pair,
    encode_prompt,
    encode_rows,
    encode_sample,
)

FORMAT = 1
PACKAGE = Path(__file__).resolve().parents[1]
ENCODERS: dict[str, Encoder[Any]] = {"sft": encode_sample, "pairs": encode_pair, "prompts": encode_prompt}
ENCODING_FILES = ("sources", "text_encoder", "tokenise", "token_cache", "token_store")
SMALL_FILE = 8 << 20  # bytes; below this, starting processes takes about as long as encoding
TICK_SECONDS = 1.0
Tick = Callable[[], None]


@dataclass(frozen=True)
class Job:
    """What is encoded, and how: all that a process needs to know."""

    path: Path
    kind: RowKind
    max_length: int
    parts: Path  # directory of the finished spans


def prepare(
    path: str | Path,
    kind: RowKind,
    tokeniser: Tokeniser,
    max_length: int,
    cache_dir: str | Path,
    *,
    workers: int | None = None,
    tick: Tick = lambda: None,
) -> Path:
    """The cache entry of a data file, made now if it is not there. Returns its directory.

    Args:
        workers: processes that encode; 0 or 1 encode in this one; None takes one a core for files over 8 MiB.
        tick: called every second or so while this lasts.

    Raises:
        UserError: if the file cannot be read or changes while it is read, the cache cannot be written, or a
            process was killed (what is done stays done).
    """
    path = Path(path)
    about = {**made_of(tokeniser, kind, max_length), "file": file_digest(path)}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    directory = Path(cache_dir) / f"{path.stem}-{name}"
    if (directory / META).is_file():
        return directory
    job = Job(path, kind, max_length, directory / "parts")
    try:
        job.parts.mkdir(parents=True, exist_ok=True)
        with _locked(directory, tick):
            # Another run may have made it while this one waited.
            if not (directory / META).is_file():
                files = _encode(job, tokeniser, _processes(workers, path), tick)
                if file_digest(path) != about["file"]:
                    shutil.rmtree(job.parts)
                    raise UserError(f"{path} changed while it was being read: run again when it is whole")
                merge_parts(directory, files, path, kind, about)
                shutil.rmtree(job.parts)
    except OSError as error:
        raise UserError(
            f"cannot write token cache {directory}: {error.strerror or error}. Set model.data.cache_dir to a "
            "directory with room."
        ) from error
    return directory


def load(directory: Path, path: str | Path, max_length: int, skip_malformed: bool) -> TokenStore[Encoded]:
    """Open an entry of `prepare`, and stop at what was wrong with its file as `sources.read_rows` would.

    Raises:
        UserError: bad lines without `skip_malformed`, or no usable row.
    """
    store: TokenStore[Encoded] = TokenStore(directory, str(path))
    conclude(store.malformed, store.kind, skip_malformed)
    store.report.require_rows(max_length)
    return store


def made_of(tokeniser: Tokeniser, kind: RowKind, max_length: int) -> dict[str, Any]:
    """Everything but the data file that the tokens depend on."""
    return {
        "format": FORMAT,
        "kind": kind,
        "max_length": max_length,
        "tokenizer": _digest(tokeniser.backend.to_str().encode()),
        "template": _digest(CHAT_TEMPLATE.encode()),
        "code": code_digest(),
        "tokenizers": version("tokenizers"),
    }


def code_digest(package: Path = PACKAGE) -> str:
    """SHA-256 of the source files that decide which tokens a row becomes: no version number to forget."""
    files = [package / "data" / f"{name}.py" for name in ENCODING_FILES]
    files += sorted((package / "roleplay").rglob("*.py"))
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes. UserError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read data file {path}: {error.strerror or error}") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _processes(workers: int | None, path: Path) -> int:
    if workers is not None:
        return workers
    return 1 if path.stat().st_size < SMALL_FILE else len(os.sched_getaffinity(0))


@contextmanager
def _locked(directory: Path, tick: Tick) -> Iterator[None]:
    """Only one run makes an entry; the others wait for it. The lock goes when its process goes, however it ends."""
    with (directory / "lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                tick()
                time.sleep(TICK_SECONDS)
        yield


# ---------------------------------------------------------------- encoding


def _encode(job: Job, tokeniser: Tokeniser, processes: int, tick: Tick) -> list[Path]:
    """The files of all spans in order, those that are missing made now."""
    todo = spans(job.path)
    files = [job.parts / f"{number:07d}.npz" for number in range(len(todo))]
    missing = [(file, span) for file, span in zip(files, todo, strict=True) if not file.is_file()]
    with tqdm(
        total=len(files), initial=len(files) - len(missing), desc=job.path.name, unit="span", disable=None
    ) as bar:

        def advance(spans_done: int) -> None:
            bar.update(spans_done)
            tick()

        if processes < 2 or len(missing) < 2:
            for file, span in missing:
                encode_span(tokeniser, job, file, span)
                advance(1)
        else:
            _encode_in_processes(job, tokeniser, missing, min(processes, len(missing)), advance)
    return files


def encode_span(tokeniser: TextEncoder, job: Job, file: Path, span: Span) -> None:
    """Read, check and encode one span, and write its part."""
    rows, malformed = read_span(job.path, job.kind, span)
    items, report = encode_rows(ENCODERS[job.kind], tokeniser, rows, job.max_length)
    write_part(file, items, report, malformed)


def _encode_in_processes(
    job: Job,
    tokeniser: TextEncoder,
    missing: list[tuple[Path, Span]],
    processes: int,
    advance: Callable[[int], None],
) -> None:
    # Spawned, not forked: this process may hold CUDA, gloo's threads and the tokenizer's.
    pool = ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(job, tokeniser.backend, tokeniser.start_id, tokeniser.eos_id, os.getpid()),
    )
    try:
        pending: set[Future[None]] = {pool.submit(_work, file, span) for file, span in missing}
        while pending:
            done, pending = wait(pending, timeout=TICK_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            advance(len(done))
    except BrokenProcessPool as error:
        raise UserError(
            f"{job.path}: a process that was encoding it ended suddenly (out of memory?). What is done is kept; run "
            "again to go on, with a smaller model.data.num_workers if memory was short."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[TextEncoder, Job] | None = None  # in a worker process: what its initializer made


def _start_worker(job: Job, backend: Tokenizer, start_id: int, end_id: int, parent: int) -> None:
    global _worker
    # Ctrl-C goes to the whole terminal group: the parent ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # The processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = TextEncoder(backend, start_id, end_id), job


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: a killed parent cannot end its workers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(file: Path, span: Span) -> None:
    assert _worker is not None
    encode_span(*_worker, file, span)
