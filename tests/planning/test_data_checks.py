"""What is said of `her-nemo data` before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from her_nemo.config import compose
from her_nemo.planning import data_checks, preflight
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


ASKED = ["stage=role_thinking", "endpoint=http://localhost:8000/v1", "model=m"]


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["source={}/nope.jsonl"], "source", "no such file"),
        (["source={}/none"], "source", "no conversations.parquet here"),
        (["source={}/none", "stage=principles"], "source", "name a file of preference pairs"),
        (["endpoint=localhost:8000"], "endpoint", "http://localhost:8000/v1"),
        (["api_key_env=KEY_OF_NOBODY"], "api_key_env", "not set\n     -> export KEY_OF_NOBODY=..."),
        (["limits.budget=2"], "limits.budget", "prices.prompt_per_million"),
        (["prompts_dir={}/nope"], "prompts_dir", "no such directory"),
        (["prompt_versions={role_thinkin: 1}"], "prompt_versions", "did you mean role_thinking?"),
        (["role_thinking.min_characters=300"], "role_thinking.min_characters", "use 200 or less"),
        (["system_thinking.max_characters=700"], "system_thinking.min_characters", "800 is more than"),
        (["out={}/book.json"], "out", "is a file"),
    ],
)
def test_problems_of_synthesis(place: Path, overrides: list[str], key: str, words: str) -> None:
    good = [*ASKED, f"source={place}/book.json", f"out={place}/new"]
    assert found("data_synthesise", *good) == {}
    problems = found("data_synthesise", *good, *(text.replace("{}", str(place)) for text in overrides))
    assert set(problems) == {key}
    assert words in problems[key]


def test_the_prompts_are_those_of_the_package() -> None:
    folder = Path(data_checks.__file__).parents[1] / "data" / "synthesis" / "prompts"
    assert {file.name.split(".")[0] for file in folder.glob("*.jinja")} == set(data_checks.PROMPTS)
