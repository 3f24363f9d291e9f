"""What is said of `her-nemo data` before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from her_nemo.config import compose
from her_nemo.planning import preflight
from her_nemo.planning.data_checks import is_dataset_name


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "book.json").write_text("{}")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "none").mkdir()
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.json").write_text("{}")
    return tmp_path


def found(stage: str, *overrides: str) -> dict[str, str]:
    return {problem.key: str(problem) for problem in preflight.check(compose.load(stage, list(overrides)))}


@pytest.mark.parametrize("path", ["{}/book.json", "{}/books", "[{}/book.json,{}/books]", "someone/tales", "tales"])
def test_nothing_is_wrong(place: Path, path: str) -> None:
    assert found("data_ingest", f"path={path.replace('{}', str(place))}", f"out={place}/out") == {}
    assert found("data_inspect", f"path={place}/book.json") == {}


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["path={}/nope.json"], "path", "no such file"),
        (["path=a/b/c"], "path", "no such file"),
        (["path={}/notes.txt"], "path", "they end in .json"),
        (["path={}/empty.jsonl"], "path", "the file is empty"),
        (["path={}/none"], "path", "no data files here"),
        (["path=[]"], "path", "no path in the list"),
        (["path=[{}/book.json,{}/nope.json]"], "path", "nope.json: no such file"),
        (["path={}/book.json", "test_set={}/nope.json"], "test_set", "no such file"),
        (["path={}/book.json", "dataset_split=train"], "dataset_split", "a datasets name only"),
        (["path={}/book.json", "dataset_config=x"], "dataset_config", "a datasets name only"),
        (["path={}/book.json", "shares.test=0.1"], "shares", "= 1.1, not 1"),
        (["path={}/book.json", "allow_defects=[unclosd]"], "allow_defects", "did you mean unclosed?"),
        (["path={}/book.json", "out={}/notes.txt"], "out", "is a file"),
        (["path={}/book.json", "out={}"], "out", "which is replaced"),
        (["path={}/books", "out={}/books"], "out", "which is replaced"),
    ],
)
def test_each_problem_of_ingest(place: Path, overrides: list[str], key: str, words: str) -> None:
    problems = found("data_ingest", f"out={place}/out", *(text.replace("{}", str(place)) for text in overrides))
    assert list(problems) == [key]
    assert words in problems[key]


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["path={}/nope.parquet"], "path", "no such file"),
        (["path={}/books"], "path", "name a file in it"),
        (["path={}/book.json", "tokenizer={}/none"], "tokenizer", "no tokenizer here"),
    ],
)
def test_each_problem_of_inspect(place: Path, overrides: list[str], key: str, words: str) -> None:
    problems = found("data_inspect", *(text.replace("{}", str(place)) for text in overrides))
    assert list(problems) == [key]
    assert words in problems[key]


@pytest.mark.parametrize("name", ["tales", "someone/tales", "a.b/c-d_e"])
def test_names_of_datasets(name: str) -> None:
    assert is_dataset_name(name)


@pytest.mark.parametrize("name", ["a/b/c", "/abs", "./x", "x.json", "o/x.parquet", "", "a b", "../up"])
def test_what_is_no_name(name: str) -> None:
    assert not is_dataset_name(name)
