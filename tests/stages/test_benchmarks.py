"""The door to the benchmarks: which stage is meant, and what is said before any endpoint is asked."""

from __future__ import annotations

import pytest

from her_nemo.config.errors import ConfigErrors, UserError
from her_nemo.stages import benchmarks


@pytest.mark.parametrize(
    ("words", "stage", "rest"),
    [
        ([], "evaluate", []),
        (["model=m", "prompts=p"], "evaluate", ["model=m", "prompts=p"]),
        (["benchmark=coser", "out=o"], "evaluate_coser", ["out=o"]),
        (["out=o", "benchmark=coser", "runs=2"], "evaluate_coser", ["out=o", "runs=2"]),
        (["coser", "out=o"], "evaluate_coser", ["out=o"]),
        (["coser", "benchmark=coser"], "evaluate_coser", []),
        (["--help"], "evaluate", ["--help"]),
    ],
)
def test_which_stage(words, stage, rest) -> None:
    assert benchmarks.parse(words) == (stage, rest)


def test_no_such_benchmark() -> None:
    with pytest.raises(UserError, match="no benchmark 'cozer': did you mean coser"):
        benchmarks.parse(["benchmark=cozer"])
    with pytest.raises(UserError, match="give one benchmark"):
        benchmarks.parse(["benchmark=coser", "benchmark=other"])


def problems(*overrides: str) -> dict[str, str]:
    from her_nemo.config import compose
    from her_nemo.planning import preflight

    try:
        found = preflight.check(compose.load("evaluate_coser", list(overrides)), {})
    except ConfigErrors as error:
        found = error.problems
    return {problem.key: problem.message for problem in found}


def test_everything_wrong_is_said_at_once(tmp_path) -> None:
    (tmp_path / "scenes.json").write_text("[]")
    fine = [
        f"scenes={tmp_path / 'scenes.json'}",
        "actor.endpoint=http://localhost:8000/v1",
        "judge.endpoint=http://localhost:8000/v1",
    ]
    assert problems(*fine) == {}
    assert problems(f"scenes={tmp_path / 'scenes.json'}").keys() == {"actor.endpoint", "judge.endpoint"}
    found = problems(
        "scenes=/nowhere.json",
        "actor.endpoint=localhost",
        "actor.api_key_env=NOT_SET_HERE",
        f"judge.checkpoint={tmp_path}",
        "environment.endpoint=http://x/v1",
        "environment.checkpoint=/model",
        "max_rounds=3",
        "continue_from=3",
        "retrieval=expr3",
        "protocol=her",
        "prompts_dir=/nowhere",
    )
    assert found.keys() == {
        "scenes", "actor.endpoint", "actor.api_key_env", "judge.checkpoint", "environment.checkpoint", "continue_from",
        "retrieval", "books", "prompts_dir",
    }  # fmt: skip
    assert "NOT_SET_HERE" in found["actor.api_key_env"]


def test_the_command_refuses_with_exit_code_2(her_nemo) -> None:
    done = her_nemo("evaluate", "benchmark=coser", "scenes=x.json", "actor.endpoint=http://localhost:1/v1")
    assert done.returncode == 2
    assert "scenes: x.json: no such file" in done.stderr
    assert "judge.endpoint" in done.stderr
    assert "Traceback" not in done.stderr
