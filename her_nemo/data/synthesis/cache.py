"""Answers on disk, one file each, under the digest of everything that shaped them.

A file is written whole or not at all, so the cache is also what a killed run resumes from: nothing that was
paid for is asked twice. Plain files work on the network file systems of clusters, where SQLite's log does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from her_nemo.config.errors import UserError

FORMAT = 1


def cache_key(identity: Mapping[str, Any], request: Mapping[str, Any], attempt: int) -> str:
    """SHA-256 of the model's identity, the whole request (messages, schema, sampling) and the attempt."""
    whole = {"format": FORMAT, "identity": dict(identity), "request": dict(request), "attempt": attempt}
    text = json.dumps(whole, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class AnswerCache:
    """A directory of `ab/abcdef....json`. Several processes may share it."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache_dir {directory} cannot be made: {error.strerror or error}") from error

    def _file(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.json"

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored answer or None.

        Raises:
            UserError: if the file is there but damaged: a wrong answer must not pass for a missing one.
        """
        file = self._file(key)
        try:
            body = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: damaged cache file ({error}); delete it to ask again") from error
        if not isinstance(body, dict) or body.get("key") != key:
            raise UserError(f"{file}: not the answer its name says; delete it to ask again")
        return body

    def put(self, key: str, body: Mapping[str, Any]) -> None:
        """Stores an answer, atomically and durably."""
        file = self._file(key)
        file.parent.mkdir(exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=file.parent, prefix=f"{key}.", suffix=".partial")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump({"key": key, **body}, out)  # ASCII: an answer may hold lone surrogates
                out.flush()
                os.fsync(out.fileno())
            os.replace(partial, file)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
