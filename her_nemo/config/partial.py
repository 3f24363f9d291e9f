"""A configuration whose required keys need not all be there yet: for planning and for looking at it."""

from __future__ import annotations

from her_nemo.config import compose
from her_nemo.config.errors import ConfigErrors, Problem
from her_nemo.config.problems import MISSING
from her_nemo.config.schema import StageConfig

NOT_GIVEN = "<not given>"


def load(
    stage: str, overrides: list[str], config_dir: str | None = None, config_name: str | None = None
) -> tuple[StageConfig, list[Problem], list[str]]:
    """(the configuration, what else is wrong with it, the required keys not given, which hold NOT_GIVEN).

    Raises ConfigErrors when more is wrong than unknown keys, as `compose.load` does.
    """
    to_give: list[str] = []
    asked: list[Problem] = []
    for _ in range(2):
        filled = [*overrides, *(compose.assign(key, NOT_GIVEN) for key in to_give)]
        try:
            return compose.load(stage, filled, config_dir, config_name), [], to_give
        except ConfigErrors as error:
            missing = [problem for problem in error.problems if problem.message == MISSING]
            if to_give or not missing:
                if error.rest is None:
                    # NOT_GIVEN is no value of a key that is one of a few words: say that it is missing, as it is.
                    others = [problem for problem in error.problems if problem.key not in to_give]
                    wanted = [problem for problem in asked if problem.key in {p.key for p in error.problems}]
                    raise ConfigErrors([*wanted, *others], stage=stage) from error
                return error.rest, error.problems, to_give
            asked, to_give = missing, [problem.key for problem in missing]
    raise AssertionError("unreachable: the second round returns or raises")
