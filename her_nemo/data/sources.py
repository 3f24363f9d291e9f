"""Reading rows from JSON Lines or Parquet, and saying exactly which are bad.

Every row is checked before anything is trained. By default one bad line stops the run with an error that
names file, line and problem; with `skip_malformed` bad lines are left out and counted by kind. A file is read
in spans of consecutive rows, so that several processes can share one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from her_nemo.config.errors import UserError
from her_nemo.roleplay.prompt import CONTROL_TOKENS

RowKind = Literal["sft", "pairs", "prompts", "text"]
Row = dict[str, Any]
SHOWN = 20  # problems written out in an error
ROLES = ("system", "user", "assistant")


class _BadRow(Exception):
    """A problem of one row: its kind (what is counted) and a sentence."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class MalformedReport:
    """What was wrong in one file."""

    path: Path
    lines: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)  # the first SHOWN, as file:line: problem

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    def __str__(self) -> str:
        by_kind = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        return f"{self.path}: {self.total} of {self.lines} lines malformed" + (
            f" ({by_kind})" if by_kind else ""
        )

    def add(self, other: MalformedReport) -> None:
        """Count what was found further down the same file."""
        self.lines += other.lines
        self.kinds.update(other.kinds)
        self.problems += other.problems[: SHOWN - len(self.problems)]


@dataclass(frozen=True)
class Span:
    """Consecutive rows of a file. `first` is the number of the first line (or Parquet row), from 1."""

    first: int
    start: int  # JSON Lines: bytes [start, stop); Parquet: rows [start, stop)
    stop: int


def is_parquet(path: str | Path) -> bool:
    """Whether `path` is read as Parquet (by its suffix); all else is JSON Lines."""
    return Path(path).suffix == ".parquet"


def read_rows(
    path: str | Path, kind: RowKind, skip_malformed: bool = False
) -> tuple[list[Row], MalformedReport]:
    """All good rows of a file, in order, and the report on the bad ones.

    Args:
        path: UTF-8 with one JSON object a line (blank lines are passed over), or `.parquet` with the same keys
            as columns.
        kind: sft (`messages` ends with the reply), pairs (`messages` ends with a user message; `chosen`,
            `rejected`), prompts (`messages` ends with a user message) or text (`text`).
        skip_malformed: leave bad lines out instead of stopping.

    Raises:
        UserError: if the file cannot be read, if a line is bad and `skip_malformed` is off (all problems in
            one error, the first 20 written out), or if no good row is left.
    """
    report = MalformedReport(Path(path))
    rows: list[Row] = []
    for span in spans(path):
        found, seen = read_span(path, kind, span)
        rows += found
        report.add(seen)
    conclude(report, kind, skip_malformed)
    return rows, report


def read_jsonl(
    path: str | Path, kind: RowKind, skip_malformed: bool = False
) -> tuple[list[Row], MalformedReport]:
    """`read_rows`, under the name of the format that most files have."""
    return read_rows(path, kind, skip_malformed)


def conclude(report: MalformedReport, kind: RowKind, skip_malformed: bool) -> None:
    """Stop at what a finished report says, if it has to be stopped at: see `read_rows`."""
    if report.total and not skip_malformed:
        more = report.total - len(report.problems)
        raise UserError(
            f"{report}\n  "
            + "\n  ".join(report.problems)
            + (f"\n  ... and {more} more" if more else "")
            + "\nMend these lines, or set model.data.skip_malformed=true to leave them out."
        )
    if report.total == report.lines:
        raise UserError(
            f"{report.path}: no usable {kind} rows ({report.lines} lines, {report.total} malformed)"
        )


def spans(path: str | Path, size: int = 256) -> list[Span]:
    """The file cut into runs of `size` rows (the last is shorter). They depend on the file and `size` alone.

    Raises:
        UserError: if the file cannot be read.
    """
    path = Path(path)
    if is_parquet(path):
        count = _parquet(path, _version(path)).metadata.num_rows
        return [Span(start + 1, start, min(start + size, count)) for start in range(0, count, size)]
    found: list[Span] = []
    first, start, position, number = 1, 0, 0, 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                position += len(line)
                if number % size == 0:
                    found.append(Span(first, start, position))
                    first, start = number + 1, position
    except OSError as error:
        raise _unreadable(path, error) from error
    if position > start:
        found.append(Span(first, start, position))
    return found


def read_span(path: str | Path, kind: RowKind, span: Span) -> tuple[list[Row], MalformedReport]:
    """The good rows of one span and the report on its bad ones, without stopping at those.

    Raises:
        UserError: if the file cannot be read.
    """
    path = Path(path)
    report = MalformedReport(path)
    rows: list[Row] = []
    for number, read in _parquet_rows(path, span) if is_parquet(path) else _lines(path, span):
        report.lines += 1
        try:
            row = read()
            _CHECKS[kind](row)
            rows.append(row)
        except _BadRow as problem:
            report.kinds[problem.kind] += 1
            if len(report.problems) < SHOWN:
                report.problems.append(f"{path}:{number}: {problem.kind}: {problem}")
    return rows, report


def _lines(path: Path, span: Span) -> Iterator[tuple[int, Callable[[], Row]]]:
    try:
        with path.open("rb") as file:
            file.seek(span.start)
            block = file.read(span.stop - span.start)
    except OSError as error:
        raise _unreadable(path, error) from error
    for number, line in enumerate(_split_lines(block), start=span.first):
        if line.strip():
            yield number, lambda line=line: _json_object(line)


def _split_lines(block: bytes) -> Iterable[bytes]:
    # bytes.splitlines would also cut at a lone carriage return, which a file opened in binary does not.
    return block.split(b"\n")


def _parquet_rows(path: Path, span: Span) -> Iterator[tuple[int, Callable[[], Row]]]:
    file = _parquet(path, _version(path))
    begin = 0
    for group in range(file.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        if begin < span.stop and end > span.start:
            low, high = max(span.start, begin), min(span.stop, end)
            rows = _row_group(path, _version(path), group).slice(low - begin, high - low).to_pylist()
            for number, row in enumerate(rows, start=low + 1):
                yield number, lambda row=row: row
        begin = end


def _version(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise _unreadable(path, error) from error


@lru_cache(maxsize=4)
def _parquet(path: Path, _: int) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read data file {path} as Parquet: {error}") from error


@lru_cache(maxsize=2)
def _row_group(path: Path, version: int, group: int) -> Any:
    """A row group holds many spans: the last two are kept."""
    return _parquet(path, version).read_row_group(group)


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot read data file {path}: {error.strerror or error}")


def _json_object(line: bytes) -> Row:
    """One line as a row, not yet checked. Raises _BadRow."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _BadRow("bad_encoding", f"not UTF-8 at byte {error.start}") from None
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        what = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise _BadRow("invalid_json", f"not JSON: {what}{where}") from None
    if not isinstance(row, dict):
        raise _BadRow("not_an_object", f"a JSON {type(row).__name__}, not an object")
    return row


def _require(row: Row, key: str, kind: type, where: str = "") -> Any:
    if key not in row:
        raise _BadRow("missing_key", f"no key {where + key!r} (keys: {', '.join(map(str, row)) or 'none'})")
    if not isinstance(row[key], kind):
        raise _BadRow("wrong_type", f"{where + key!r} is a {type(row[key]).__name__}, not a {kind.__name__}")
    return row[key]


def _check_text(text: str, where: str, *, control: bool = True) -> None:
    """Text that can be encoded and that cannot forge the borders of a message."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRow("bad_encoding", f"{where} has a lone surrogate: not valid text") from None
    for token in CONTROL_TOKENS if control else ():
        if token in text:
            raise _BadRow("control_token", f"{where} contains {token}, which ends or begins a message")


def _check_messages(row: Row, last: str) -> None:
    """System first and once, then a user message, never two user messages in a row; ends with `last`.

    Two assistant messages in a row are allowed: HER's data have them where a character speaks twice.
    """
    messages = _require(row, "messages", list)
    roles: list[str] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise _BadRow("wrong_type", f"{where} is a {type(message).__name__}, not an object")
        role = _require(message, "role", str, where + ".")
        content = _require(message, "content", str, where + ".")
        if role not in ROLES:
            raise _BadRow("role_order", f"{where}.role is {role!r}, not one of {', '.join(ROLES)}")
        _check_text(content, f"{where}.content")
        roles.append(role)
    if not roles:
        raise _BadRow("role_order", "messages is empty")
    turns = roles[1:] if roles[0] == "system" else roles
    problem = None
    if "system" in turns:
        problem = "a system message that is not the first"
    elif turns[:1] != ["user"]:
        problem = "the first message after the system prompt is not the user's"
    elif any(a == b == "user" for a, b in pairwise(turns)):
        problem = "two user messages in a row"
    elif turns[-1] != last:
        problem = f"the last message is the {turns[-1]}'s, not the {last}'s"
    if problem:
        order = " ".join(role[0] for role in roles[:40])
        raise _BadRow("role_order", f"{problem} (roles: {order})")


def _check_reply(text: str, where: str) -> None:
    _check_text(text, where)
    if not text.strip():
        raise _BadRow("empty_reply", f"{where} is empty")


def _check_sft(row: Row) -> None:
    _require(row, "trace_id", str)
    _check_messages(row, last="assistant")
    _check_reply(row["messages"][-1]["content"], "the last message")


def _check_prompts(row: Row) -> None:
    _require(row, "trace_id", str)
    _check_messages(row, last="user")


def _check_pairs(row: Row) -> None:
    _check_prompts(row)
    for key in ("chosen", "rejected"):
        _check_reply(_require(row, key, str), repr(key))
    if row["chosen"] == row["rejected"]:
        raise _BadRow("identical_pair", "'chosen' and 'rejected' are the same text")


def _check_plain(row: Row) -> None:
    text = _require(row, "text", str)
    # <|endoftext|> and the like may stand in a corpus of whole chats.
    _check_text(text, "'text'", control=False)
    if not text.strip():
        raise _BadRow("empty_text", "'text' is empty")


_CHECKS: dict[str, Callable[[Row], None]] = {
    "sft": _check_sft,
    "pairs": _check_pairs,
    "prompts": _check_prompts,
    "text": _check_plain,
}
