"""`her-nemo evaluate benchmark=NAME ...` as the stage `evaluate_NAME`: each benchmark has keys of its own.

Without `benchmark` it is the stage `evaluate`. `her-nemo evaluate NAME ...` is the same as `benchmark=NAME`.
"""

from __future__ import annotations

from collections.abc import Sequence

from her_nemo.config.errors import UserError, nearest
from her_nemo.config.schema import STAGES

PREFIX = "evaluate_"
KEY = "benchmark="


def parse(words: Sequence[str]) -> tuple[str, list[str]]:
    """The stage that `evaluate` and these words mean, and the rest as overrides.

    Raises:
        UserError: if there is no such benchmark, or two are named.
    """
    names = [stage.removeprefix(PREFIX) for stage in STAGES if stage.startswith(PREFIX)]
    rest = list(words)
    given = [word.removeprefix(KEY) for word in rest if word.startswith(KEY)]
    if rest and rest[0] in names:
        given.insert(0, rest.pop(0))
    if not given:
        return "evaluate", rest
    if len(set(given)) > 1:
        raise UserError(f"evaluate {' and '.join(given)}: give one benchmark")
    if given[0] not in names:
        close = nearest(given[0], names)
        hint = f"did you mean {close}? " if close else ""
        raise UserError(f"no benchmark {given[0]!r}: {hint}benchmarks: {', '.join(names)}")
    return PREFIX + given[0], [word for word in rest if not word.startswith(KEY)]
